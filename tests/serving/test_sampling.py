"""Rows with options of their own against generation.sampling, one row at a time."""

import pytest
import torch

from statespan.generation.sampling import BLOCK, RandomNumbers, Sampling, choose, random_numbers, weights
from statespan.serving.sampling import RowSampling, choose_rows, row_weights

WAYS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=3.0, top_k=5),
    Sampling(top_k=1),
    Sampling(top_p=0.4),
    Sampling(top_p=0.97, temperature=2.0),
    Sampling(min_p=0.3),
    Sampling(top_k=20, top_p=0.8, min_p=0.05, temperature=1.7),
    Sampling(top_k=1000, top_p=1.0, min_p=0.0),
    Sampling(top_k=3, top_p=0.99),
]


@pytest.mark.parametrize("vocab_size", [7, 64, 501])
def test_each_row_gets_what_it_gets_alone(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        logits = 3 * torch.randn(len(WAYS), vocab_size, generator=generator)
        logits[:, ::5] = logits[:, :1]  # ties, also at the edges of the filters
        numbers = torch.rand(len(WAYS), dtype=torch.float64, generator=generator)
        rows = RowSampling.of(WAYS, vocab_size, "cpu")
        ids, best = choose_rows(logits, rows, numbers)
        kept = row_weights(logits, rows, logits.amax(-1))
        for row, way in enumerate(WAYS):
            alone = slice(row, row + 1)
            if not way.greedy:
                assert torch.equal(kept[alone], weights(logits[alone], way)), way
            expected, largest = choose(logits[alone], way, None if way.greedy else numbers[alone])
            assert ids[row] == expected[0], way
            assert best[row] == largest[0]


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_alike(way: Sampling) -> None:
    """Also where no row uses a filter, or all do."""
    logits, numbers = 2 * torch.randn(4, 50), torch.rand(4, dtype=torch.float64)
    ids, _ = choose_rows(logits, RowSampling.of([way] * 4, 50, "cpu"), numbers)
    assert torch.equal(ids, choose(logits, way, None if way.greedy else numbers)[0])


def test_random_numbers_come_in_the_order_of_generate() -> None:
    mine, generator = RandomNumbers(torch.Generator().manual_seed(8)), torch.Generator().manual_seed(8)
    for _ in range(2 * BLOCK + 3):
        assert mine.use()[0] == float(random_numbers([generator], 1))


def test_masked_and_broken_rows_leave_the_others_alone() -> None:
    logits = torch.randn(4, 9)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 1:] = -torch.inf
    rows = RowSampling.of([Sampling(top_p=0.5)] * 4, 9, "cpu")
    ids, best = choose_rows(logits, rows, torch.full((4,), 0.999, dtype=torch.float64))
    assert best.isfinite().tolist() == [False, False, True, True]
    assert ids[2] == 0
    expected, _ = choose(logits[3:], Sampling(top_p=0.5), torch.tensor([0.999], dtype=torch.float64))
    assert ids[3] == expected[0]
