"""The tree over a real pool: what it finds, what it holds, what it lets go."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.models.language_model import LanguageModel
from statespan.serving.prefix_cache import PrefixCache
from statespan.serving.runner import Chunk, Runner
from statespan.serving.state_pool import StatePool

PAGE = 4


class Fixture:
    """A pool whose row 0 absorbs tokens and is remembered after them."""

    def __init__(self, model: LanguageModel, max_bytes: int = 1 << 30, num_pages: int = 200) -> None:
        self.pool = StatePool(model, 2, num_pages, PAGE)
        self.cache = PrefixCache(self.pool, max_bytes)
        self.runner = Runner(model, self.pool)

    def add(self, *tokens: int) -> None:
        self.pool.clear(0)
        self.runner.prefill([Chunk(0, tokens)])
        self.cache.insert(tokens, self.pool.snapshot(0))
        self.pool.clear(0)
        self.check()

    def check(self) -> None:
        self.cache.check()
        held = Counter[int]()
        for node in self.cache.nodes():
            held.update(node.snapshot.pages if node.snapshot is not None else ())
        assert self.pool.pages.num_free == self.pool.pages.num_pages - 1 - len(held)

    def found(self, *prompt: int) -> tuple[int, int]:
        """Tokens to start from, and tokens known."""
        match = self.cache.match(prompt, len(prompt) - 1)
        return match.num_tokens, match.num_known


def test_the_deepest_snapshot_strictly_inside_the_prompt(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    assert it.found(1, 2, 3) == (0, 0)
    it.add(1, 2, 3, 4)
    it.add(1, 2)
    assert it.found(1, 2, 3, 4, 5) == (4, 4)
    assert it.found(1, 2, 3, 4) == (2, 3)  # the last token must be fed
    assert it.found(1, 2, 3, 9, 9) == (2, 3)
    assert it.found(1, 2) == (0, 1)
    assert it.found(2, 2, 3, 4, 5) == (0, 0)
    assert it.found(1) == (0, 0)


def test_paths_split_where_prompts_part(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(5, 6, 7, 8)
    it.add(5, 6, 9)
    assert it.found(5, 6, 1) == (0, 2)  # known, but nobody stood there
    assert len(list(it.cache.nodes())) == 3
    it.add(5, 6)
    assert it.found(5, 6, 1) == (2, 2)
    assert it.found(5, 6, 7, 8, 1) == (4, 4) and it.found(5, 6, 9, 1) == (3, 3)


def test_a_snapshot_is_the_state_after_its_tokens(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    tokens, rest = (3, 1, 4, 1, 5, 9, 2), (6, 5)
    it.add(*tokens, *rest, 7)
    it.add(*tokens)
    node = it.cache.match((*tokens, 0), 7).node
    assert node is not None
    snapshot = it.cache.fetch(node)
    assert snapshot is not None
    it.pool.restore(1, snapshot)
    logits = it.runner.prefill([Chunk(1, rest)])
    with torch.no_grad():
        expected = hybrid(torch.tensor([[*tokens, *rest]], device=hybrid.device)).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_same_tokens_twice_are_kept_once(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(1, 2, 3)
    size = it.cache.num_bytes
    it.add(1, 2, 3)
    assert it.cache.num_bytes == size and len(it.cache) == 1
    assert it.cache.has((1, 2, 3)) and not it.cache.has((1, 2)) and not it.cache.has((1, 2, 3, 4))


def test_bytes_are_states_and_each_page_once(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(*range(8))
    state = it.pool.row_bytes
    assert it.cache.num_bytes == state + 2 * it.pool.page_bytes
    it.runner.prefill([Chunk(0, tuple(range(8)))])
    before = it.cache.num_bytes
    for stop in (10, 11):  # of one row: pages are shared
        it.runner.prefill([Chunk(0, tuple(range(it.pool.num_tokens[0], stop)))])
        it.cache.insert(tuple(range(stop)), it.pool.snapshot(0))
    assert it.cache.num_bytes == before + 2 * state + 3 * it.pool.page_bytes


def test_the_least_recently_used_leave_first(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(1, 1, 1)
    one = it.cache.num_bytes
    it = Fixture(hybrid, max_bytes=3 * one)
    for first in (1, 2, 3):
        it.add(first, 1, 1)
    it.found(1, 1, 1, 0)
    it.add(4, 1, 1)
    assert [it.found(first, 1, 1, 0)[0] for first in (1, 2, 3, 4)] == [3, 0, 3, 3]
    assert it.cache.counts["cache_evictions"] == 1
    assert it.cache.num_bytes <= 3 * one


def test_what_is_larger_than_the_cache_evicts_nobody(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(1, 2)
    it = Fixture(hybrid, max_bytes=it.cache.num_bytes)
    it.add(1, 2)
    it.add(*range(20))
    assert it.found(1, 2, 3)[0] == 2 and len(it.cache) == 1


def test_branches_without_snapshots_are_pruned_and_joined(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(1, 2, 3, 4, 5)
    it.add(1, 2, 7)
    it.add(1, 2, 8)
    it.found(1, 2, 3, 4, 5, 0)
    it.found(1, 2, 8, 0)
    for left in (2, 1, 0):
        it.cache.free_pages(it.pool.pages.num_free + 1)
        it.check()
        assert len(it.cache) == left
    assert list(it.cache.nodes()) == []
    assert it.pool.pages.num_free == it.pool.pages.num_pages - 1


def test_pages_come_back_at_the_cost_of_old_snapshots(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid, num_pages=9)
    it.add(*range(8))
    it.add(*range(10, 18))
    it.add(*range(20, 28))
    node = it.cache.match((*range(10, 18), 0), 8).node
    free = it.pool.pages.num_free
    assert (free, it.cache.reclaimable(), it.cache.reclaimable(node)) == (2, 6, 4)
    assert it.cache.free_pages(5, keep=node)
    assert it.cache.has(tuple(range(10, 18))) and it.pool.pages.num_free >= 5
    assert not it.cache.free_pages(8, keep=node)
    assert it.cache.free_pages(8) and len(it.cache) == 0


def test_pages_of_running_rows_are_not_reclaimable(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.runner.prefill([Chunk(0, tuple(range(8)))])
    it.cache.insert(tuple(range(8)), it.pool.snapshot(0))
    assert it.cache.reclaimable() == 0
    it.pool.clear(0)
    assert it.cache.reclaimable() == 2


def test_the_metrics_say_what_was_known_without_a_snapshot(hybrid: LanguageModel) -> None:
    it = Fixture(hybrid)
    it.add(1, 2, 3, 4)
    it.cache.count(7, it.cache.match((1, 2, 3, 4, 5, 6, 7), 6))
    it.cache.count(5, it.cache.match((1, 2, 3, 9, 9), 4))
    assert dict(it.cache.counts) == {
        "cache_lookups": 2,
        "cache_hits": 1,
        "cache_prompt_tokens": 12,
        "cache_reused_tokens": 4,
        "cache_known_tokens": 3,
    }


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=25)


@pytest.mark.parametrize("room", [3, 1000])
@settings(max_examples=25)
@given(sequences, st.randoms(use_true_random=False))
def test_like_a_dictionary(hybrid: LanguageModel, room: int, keys: list[tuple[int, ...]], rng: random.Random) -> None:
    """Against a plain dict, whatever is inserted, looked up and evicted."""
    it = Fixture(hybrid, max_bytes=room * 6000)
    kept: dict[tuple[int, ...], None] = {}
    for key in keys:
        it.add(*key)
        kept[key] = None
        kept = {key: None for key in kept if it.cache.has(key)}  # what it chose to evict
        assert len(kept) == len(it.cache)
        assert room < 1000 or key in kept
        prompt = (*rng.choice(keys), rng.randrange(3))
        inside = [len(key) for key in kept if prompt[: len(key)] == key and len(key) < len(prompt)]
        assert it.found(*prompt)[0] == max(inside, default=0)
        same = [_common(prompt[:-1], key) for key in kept]
        assert it.found(*prompt)[1] == max(same, default=0)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
