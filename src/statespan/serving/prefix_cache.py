"""PrefixCache: a radix tree over token ids whose nodes own snapshots; the least recently used leave first."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from statespan.serving.spill import Spilled, SpillStore
from statespan.serving.state_pool import Snapshot, StatePool

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


class PrefixCache:
    """Snapshots of `pool` by the tokens they have absorbed, `max_bytes` of them; others go to `spill`, if there is one.

    Bytes are the snapshots' states and the pages that at least one of them holds, each counted once.
    """

    def __init__(self, pool: StatePool, max_bytes: int, spill: SpillStore | None = None) -> None:
        self.pool, self.max_bytes, self.spill = pool, max_bytes, spill
        self.counts: Counter[str] = Counter()  # of EngineMetrics
        self._root = Node(None, np.empty(0, np.int32))
        self._recent: OrderedDict[Node, None] = OrderedDict()  # those with a snapshot in memory, least recent first
        self._holds: Counter[int] = Counter()  # page: snapshots of the tree that hold it
        self._state_bytes = 0
        self._node_of: dict[Spilled, Node] = {}
        if spill is not None:
            spill.on_drop = self._forget
            for spilled in spill.entries():
                self._keep_spilled(self._grow(spilled.tokens), spilled)

    def __len__(self) -> int:
        """Snapshots in memory."""
        return len(self._recent)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self._state_bytes + len(self._holds) * self.pool.page_bytes

    def match(self, prompt: Sequence[int] | Tokens, limit: int) -> Match:
        """What is known of the first `limit` tokens of a prompt. A node that is found counts as just used."""
        tokens = np.asarray(prompt[:limit], np.int32)
        node, found, known = self._root, None, 0
        while True:
            if node.depth and node.stored:
                found = node
            child = node.children.get(int(tokens[known])) if known < limit else None
            if child is None:
                break
            same = common_length(child.tokens, tokens[known:])
            known += same
            if same < len(child.tokens):
                break
            node = child
        if found is not None:
            self._touch(found)
        return Match(found, known)

    def count(self, prompt_tokens: int, match: Match) -> None:
        """Note a look-up that a request was admitted with."""
        self.counts["cache_lookups"] += 1
        self.counts["cache_hits"] += match.num_tokens > 0
        self.counts["cache_prompt_tokens"] += prompt_tokens
        self.counts["cache_reused_tokens"] += match.num_tokens
        self.counts["cache_known_tokens"] += match.num_known - match.num_tokens

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot in memory after exactly these tokens."""
        node = self._find(np.asarray(tokens, np.int32))
        return node is not None and node.snapshot is not None

    def insert(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Own `snapshot`, taken after `tokens`; what is least recent leaves if there is no room."""
        if snapshot.num_bytes > self.max_bytes:
            self.pool.release(snapshot)
            return
        self._keep(self._grow(np.asarray(tokens, np.int32)), snapshot)
        self._shrink()

    def fetch(self, node: Node) -> Snapshot | None:
        """The snapshot of a node, brought back if it was spilled; None where it is too large or its file damaged.

        The pool must have free pages for it.
        """
        spilled = node.spilled
        if node.snapshot is None and spilled is not None and self.spill is not None:
            if spilled.num_bytes > self.max_bytes:
                return None
            snapshot = self.spill.load(spilled, self.pool.from_host)
            if snapshot is None:
                return None
            self.counts["spill_restored"] += 1
            self._keep(node, snapshot)
            self._shrink(keep=node)
        return node.snapshot

    def reclaimable(self, keep: Node | None = None) -> int:
        """Pages that would be free if all snapshots but that of `keep` left."""
        kept = set(keep.snapshot.pages) if keep is not None and keep.snapshot is not None else set[int]()
        holders = self.pool.pages.holders
        return sum(1 for page, count in self._holds.items() if page not in kept and holders(page) == count)

    def free_pages(self, count: int, keep: Node | None = None) -> bool:
        """Make `count` pages free, at the cost of the least recent snapshots; whether that worked."""
        while self.pool.pages.num_free < count and self._evict_oldest(keep):
            pass
        return self.pool.pages.num_free >= count

    def close(self) -> None:
        """Let go of all snapshots; with a folder to spill to they are found there after a restart."""
        for node in list(self._recent):
            self._evict(node)
        if self.spill is not None:
            self.spill.close()

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        todo = list(self._root.children.values())
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    def check(self) -> None:
        """Raise AssertionError where the tree's books are wrong."""
        nodes = list(self.nodes())
        held: Counter[int] = Counter()
        for node in nodes:
            assert node.parent is not None and node.parent.children[int(node.tokens[0])] is node
            assert node.depth == node.parent.depth + len(node.tokens) and len(node.tokens)
            assert node.stored or len(node.children) > 1, "a node that nobody needs"
            assert (node in self._recent) == (node.snapshot is not None)
            if node.snapshot is not None:
                assert node.snapshot.num_tokens == node.depth
                held.update(set(node.snapshot.pages))
        assert held == self._holds
        assert len(self._recent) == sum(node.snapshot is not None for node in nodes)
        assert {node.spilled for node in nodes if node.spilled is not None} == set(self._node_of)
        states = sum(self._bytes_of(node.snapshot) for node in nodes if node.snapshot is not None)
        assert states == self._state_bytes and self.num_bytes <= max(self.max_bytes, 0)

    def _grow(self, tokens: Tokens) -> Node:
        """The node after `tokens`, made where there is none."""
        node, place = self._root, 0
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

    def _find(self, tokens: Tokens) -> Node | None:
        node = self._root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None or not np.array_equal(child.tokens, tokens[node.depth : child.depth]):
                return None
            node = child
        return node

    def _keep(self, node: Node, snapshot: Snapshot) -> None:
        if node.snapshot is not None:  # the one that is there is as good
            self.pool.release(snapshot)
        else:
            node.snapshot = snapshot
            self._holds.update(set(snapshot.pages))
            self._state_bytes += self._bytes_of(snapshot)
            self._recent[node] = None
        self._touch(node)

    def _touch(self, node: Node) -> None:
        if node.snapshot is not None:
            self._recent.move_to_end(node)

    def _bytes_of(self, snapshot: Snapshot) -> int:
        """Without the pages, which may be shared."""
        return snapshot.num_bytes - len(snapshot.pages) * self.pool.page_bytes

    def _shrink(self, keep: Node | None = None) -> None:
        while self.num_bytes > self.max_bytes and self._evict_oldest(keep):
            pass

    def _evict_oldest(self, keep: Node | None) -> bool:
        """Whether there was one besides `keep`."""
        node = next((node for node in self._recent if node is not keep), None)
        if node is not None:
            self._evict(node)
        return node is not None

    def _evict(self, node: Node) -> None:
        """Let the snapshot of a node go out of memory."""
        snapshot = node.snapshot
        assert snapshot is not None  # who is in _recent has one
        if self.spill is not None and node.spilled is None:
            spilled = self.spill.put(node.path, self.pool.to_host(snapshot))
            if spilled is not None:
                self._keep_spilled(node, spilled)
        node.snapshot = None  # not before: what the store dropped for this one must not take the node with it
        del self._recent[node]
        for page in set(snapshot.pages):
            self._holds[page] -= 1
            if not self._holds[page]:
                del self._holds[page]
        self._state_bytes -= self._bytes_of(snapshot)
        self.pool.release(snapshot)
        self.counts["cache_evictions"] += 1
        self._prune(node)

    def _keep_spilled(self, node: Node, spilled: Spilled) -> None:
        node.spilled = spilled
        self._node_of[spilled] = node

    def _forget(self, spilled: Spilled) -> None:
        """The store dropped it."""
        node = self._node_of.pop(spilled, None)
        if node is not None:
            node.spilled = None
            self._prune(node)

    def _prune(self, node: Node) -> None:
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
