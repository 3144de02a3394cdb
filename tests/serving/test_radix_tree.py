"""RadixTree against a plain set of texts: what is known of any text, whatever was stored and dropped before."""

from typing import Any

import numpy as np
import pytest

from statespan.serving.radix_tree import RadixTree, Tokens, common_length

STORED: Any = object()  # stands in for a snapshot


def tokens(*ids: int) -> Tokens:
    return np.array(ids, np.int32)


def shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """As `common_length`, token by token."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_texts_come_and_go(seed: int) -> None:
    random = np.random.default_rng(seed)
    tree, texts = RadixTree(), set[tuple[int, ...]]()

    def draw() -> tuple[int, ...]:
        beginning: list[int] = []
        if texts and random.random() < 0.6:
            known = sorted(texts)[random.integers(len(texts))]
            beginning = list(known[: random.integers(len(known) + 1)])
        return (*beginning, *map(int, random.integers(0, 3, random.integers(1, 6))))

    for _ in range(120):
        text = draw()
        if text in texts or (texts and random.random() < 0.4):
            text = text if text in texts else sorted(texts)[random.integers(len(texts))]
            node = tree.find(tokens(*text))
            assert node is not None and node.snapshot is STORED
            node.snapshot = None
            tree.prune(node)
            texts.remove(text)
        else:
            node = tree.grow(tokens(*text))
            assert node.depth == len(text) and node.path.tolist() == list(text)
            node.snapshot = STORED
            texts.add(text)
        tree.check()
        assert {tuple(node.path.tolist()) for node in tree if node.stored} == texts
        asked = draw()
        found = tree.match(tokens(*asked))
        assert found.num_known == max((shared(asked, other) for other in texts), default=0)
        prefixes = [other for other in texts if asked[: len(other)] == other]
        assert found.num_tokens == max(map(len, prefixes), default=0)
        assert (found.node is None) == (not prefixes)
        exact = tree.find(tokens(*asked))
        assert (exact is not None and exact.stored) == (asked in texts)


def test_the_length_that_two_texts_share() -> None:
    for one, other in [((), (1,)), ((1, 2), (1, 2)), ((1, 2, 3), (1, 2)), ((1, 2, 3), (1, 4, 3)), ((5,), (6,))]:
        assert common_length(tokens(*one), tokens(*other)) == shared(one, other)


def test_an_empty_tree_knows_nothing() -> None:
    tree = RadixTree()
    assert tree.match(tokens(1, 2)).num_known == 0 and list(tree) == []
    assert tree.find(tokens()) is tree.root  # the text before the first token
