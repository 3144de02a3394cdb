"""RadixTree: nodes by the tokens that lead to them, an edge for each run of tokens that texts share."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from statespan.serving.snapshot import Snapshot
from statespan.serving.spill import Spilled

Tokens = NDArray[np.int32]


class Node:
    """The end of a path of tokens from the root. It may own a snapshot of the state there, in memory or spilled."""

    __slots__ = ("children", "depth", "parent", "snapshot", "spilled", "tokens")

    def __init__(self, parent: "Node | None", tokens: Tokens) -> None:
        self.parent, self.tokens = parent, tokens  # the tokens from the parent to here
        self.depth: int = len(tokens) + (0 if parent is None else parent.depth)
        self.children: dict[int, Node] = {}  # by the first of their tokens
        self.snapshot: Snapshot | None = None
        self.spilled: Spilled | None = None

    @property
    def stored(self) -> bool:
        """Whether a state can be had here."""
        return self.snapshot is not None or self.spilled is not None

    @property
    def path(self) -> Tokens:
        """All tokens from the root."""
        parts: list[Tokens] = []
        node: Node | None = self
        while node is not None:
            parts.append(node.tokens)
            node = node.parent
        return np.concatenate(parts[::-1])


@dataclass(frozen=True)
class Match:
    """What is known of a prompt."""

    node: Node | None  # the deepest with a snapshot
    num_known: int  # tokens that the tree has seen; a snapshot may be missing at their end

    @property
    def num_tokens(self) -> int:
        """Tokens that need not be prefilled."""
        return 0 if self.node is None else self.node.depth


class RadixTree:
    """What a node stores is its owner's affair, who calls `prune` when a node stores nothing any more."""

    def __init__(self) -> None:
        self.root = Node(None, np.empty(0, np.int32))

    def __iter__(self) -> Iterator[Node]:
        """All nodes but the root."""
        todo = list(self.root.children.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    def match(self, tokens: Tokens) -> Match:
        """What is known of the tokens."""
        node, found, known = self.root, None, 0
        while True:
            if node.depth and node.stored:
                found = node
            child = node.children.get(int(tokens[known])) if known < len(tokens) else None
            if child is None:
                break
            same = common_length(child.tokens, tokens[known:])
            known += same
            if same < len(child.tokens):
                break
            node = child
        return Match(found, known)

    def grow(self, tokens: Tokens) -> Node:
        """The node after `tokens`, made where there is none."""
        node, place = self.root, 0
        while place < len(tokens):
            first = int(tokens[place])
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = Node(node, tokens[place:].copy())
            else:
                same = common_length(child.tokens, tokens[place:])
                child = child if same == len(child.tokens) else _split(child, same)
            node, place = child, child.depth
        return node

    def find(self, tokens: Tokens) -> Node | None:
        """The node after exactly these tokens."""
        node = self.root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None or not np.array_equal(child.tokens, tokens[node.depth : child.depth]):
                return None
            node = child
        return node

    def prune(self, node: Node) -> None:
        """Remove nodes that lead to no snapshot, and join those that only lead to another."""
        while node.parent is not None and not node.stored:
            parent = node.parent
            if len(node.children) > 1:
                return
            if node.children:
                (child,) = node.children.values()
                child.tokens, child.parent = np.concatenate([node.tokens, child.tokens]), parent
                parent.children[int(child.tokens[0])] = child
                return
            del parent.children[int(node.tokens[0])]
            node = parent

    def check(self) -> None:
        """Raise AssertionError where an edge is wrong."""
        for node in self:
            assert node.parent is not None and node.parent.children[int(node.tokens[0])] is node
            assert node.depth == node.parent.depth + len(node.tokens) and len(node.tokens)
            assert node.stored or len(node.children) > 1, "a node that nobody needs"


def common_length(a: Tokens, b: Tokens) -> int:
    """Of the beginning that two texts share."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    place = int(different.argmax()) if size else 0
    return place if size and different[place] else size


def _split(node: Node, place: int) -> Node:
    """A new node `place` tokens along the edge that leads to `node`."""
    parent = node.parent
    assert parent is not None  # the root has no edge
    middle = Node(parent, node.tokens[:place].copy())
    parent.children[int(middle.tokens[0])] = middle
    node.tokens, node.parent = node.tokens[place:].copy(), middle
    middle.children[int(node.tokens[0])] = node
    return middle
