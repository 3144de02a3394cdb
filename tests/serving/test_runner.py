"""Runner: chunks of any size together, idle rows beside the decoded ones, and what a step may overwrite."""

import pytest
import torch

from statespan.errors import UserError
from statespan.layers import causal_attention
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller, capturable
from statespan.serving import runner as runner_module
from statespan.serving import state_pool
from statespan.serving.pool_memory import bucket
from statespan.serving.runner import Chunk, Runner
from statespan.serving.state_pool import StatePool

TOLERANCE = 2e-5 if torch.cuda.is_available() else 1e-5


def served(model: LanguageModel, num_rows: int = 8) -> tuple[StatePool, Runner]:
    pool = StatePool(model, num_rows, 200, 8)
    pool._memory.kv.fill_(torch.nan)
    for tensor in pool._slabs.tensors:
        tensor.fill_(torch.nan)
    return pool, Runner(model, pool)


def whole(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens.to(model.device)).logits


@pytest.mark.parametrize("cuts", [(57,), (1, 56), (8, 8, 8, 33), (3, 1, 50, 2, 1)])
def test_any_chunking_gives_the_same(family: LanguageModel, cuts: tuple[int, ...]) -> None:
    tokens = torch.randint(0, 61, (1, 57))
    _, runner = served(family, 1)
    start = 0
    for count in cuts:
        logits = runner.prefill([Chunk(0, tuple(tokens[0, start : start + count].tolist()))])
        start += count
        expected = whole(family, tokens[:, :start])[0, -1]
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("together", [1, 1 << 15], ids=["alone", "together"])
def test_rows_of_unequal_length(family: LanguageModel, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one forward with padding, or apart; rows that know much beside new ones."""
    monkeypatch.setattr(runner_module, "TOGETHER_SLOTS", together)
    pool, runner = served(family)
    tokens = torch.randint(0, 61, (5, 70))
    expected = whole(family, tokens)
    runner.prefill([Chunk(3, tuple(tokens[3, :40].tolist()))])
    lengths = {4: 1, 0: 12, 3: 9, 1: 65, 2: 12}
    chunks = [Chunk(row, tuple(tokens[row, pool.num_tokens[row] :][:count].tolist())) for row, count in lengths.items()]
    logits = runner.prefill(chunks)
    for (row, _), found in zip(lengths.items(), logits, strict=True):
        torch.testing.assert_close(found, expected[row, pool.num_tokens[row] - 1], rtol=0, atol=TOLERANCE)


def test_masks_are_made_in_blocks(hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "MASK_ELEMENTS", 1)  # 16 queries a block
    tokens = torch.randint(0, 61, (1, 57))
    _, runner = served(hybrid, 1)
    runner.prefill([Chunk(0, tuple(tokens[0, :9].tolist()))])
    logits = runner.prefill([Chunk(0, tuple(tokens[0, 9:].tolist()))])
    torch.testing.assert_close(logits[0], whole(hybrid, tokens)[0, -1], rtol=0, atol=TOLERANCE)


def test_idle_rows_are_never_read_and_waiting_ones_stay(family: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a step runs on a bucket of rows: 3 are decoded, the fourth waits with half a prompt."""
    monkeypatch.setattr(Runner, "_batch_size", lambda self, count: bucket(count))
    monkeypatch.setattr(state_pool, "padded_rows", lambda num_rows, device: bucket(num_rows))
    pool, runner = served(family, 5)
    tokens = torch.randint(0, 61, (5, 40))
    expected = whole(family, tokens)
    starts = (7, 3, 12, 9)
    runner.prefill([Chunk(row, tuple(tokens[row, :start].tolist())) for row, start in enumerate(starts)])
    for row in range(3):
        pool.reserve(row, 40)
    places = list(starts)
    for count in (3, 3, 2, 3, 1, 3):
        logits = runner.decode([int(tokens[row, places[row]]) for row in range(count)])
        assert logits.shape == (count, 61)
        for row in range(count):
            torch.testing.assert_close(logits[row], expected[row, places[row]], rtol=0, atol=TOLERANCE)
            places[row] += 1
    waited = runner.prefill([Chunk(3, tuple(tokens[3, 9:20].tolist()))])
    torch.testing.assert_close(waited[0], expected[3, 19], rtol=0, atol=TOLERANCE)
    new = runner.prefill([Chunk(4, tuple(tokens[4, :5].tolist()))])
    torch.testing.assert_close(new[0], expected[4, 4], rtol=0, atol=TOLERANCE)


def test_tokens_may_come_as_a_tensor(hybrid: LanguageModel) -> None:
    pool, runner = served(hybrid, 2)
    runner.prefill([Chunk(0, (1, 2)), Chunk(1, (3,))])
    for row in (0, 1):
        pool.reserve(row, 8)
    expected = whole(hybrid, torch.tensor([[1, 2, 5]]))[0, -1]
    logits = runner.decode(torch.tensor([5, 6], device=hybrid.device))
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=TOLERANCE)
    assert pool.num_tokens == [3, 2]


def test_warming_up_changes_nothing(family: LanguageModel) -> None:
    pool, runner = served(family, 5)
    tokens = torch.randint(0, 61, (3, 9))
    runner.prefill([Chunk(row, tuple(tokens[row, :8].tolist())) for row in range(3)])
    for row in range(3):
        pool.reserve(row, 12)
    runner.warm_up()
    logits = runner.decode(tokens[:, 8].tolist())
    torch.testing.assert_close(logits, whole(family, tokens)[:, -1], rtol=0, atol=TOLERANCE)


def test_embeddings_are_the_last_norms_output(family: LanguageModel) -> None:
    _, runner = served(family)
    found = runner.embed([Chunk(0, (5, 6, 7)), Chunk(1, (8,))])
    with torch.inference_mode():
        for row, tokens in enumerate(([[5, 6, 7]], [[8]])):
            hidden = family.embedding(torch.tensor(tokens, device=family.device))
            exact = family.normed(family.backbone(hidden)[0])[0, -1]
            torch.testing.assert_close(found[row], exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32), (33, 48)])
def test_buckets(count: int, expected: int) -> None:
    assert bucket(count) == expected


def test_bad_tokens_are_one_line_and_change_nothing(hybrid: LanguageModel) -> None:
    pool, runner = served(hybrid, 1)
    with pytest.raises(UserError, match="a chunk of a prompt must have a token"):
        runner.prefill([Chunk(0, ())])
    with pytest.raises(UserError, match="token ids must be in 0 to 60, got 2 to 61"):
        runner.prefill([Chunk(0, (2, 61))])
    with pytest.raises(UserError, match="token ids must be in 0 to 60, got -1 to -1"):
        runner.decode([-1])
    assert pool.num_tokens == [0]
    assert pool.pages_of(0) == ()


def test_rows_fed_one_after_the_other_by_a_prefiller(family: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where all of one size leave their output in the same memory."""
    if not all(map(capturable, family.layers)):
        pytest.skip("left to the model's own forward")
    parts = (family.embedding, family.backbone, family.stream_dtype, family.new_state(1))
    prefiller, memory = Prefiller(*parts), torch.empty(1, 1, family.config.hidden_size, device=family.device)
    feed = prefiller.feed
    monkeypatch.setattr(prefiller, "feed", lambda ids: memory.copy_(feed(ids)))
    monkeypatch.setattr(type(family), "prefiller", lambda self, batch_size: prefiller)
    monkeypatch.setattr(runner_module, "TOGETHER_SLOTS", 1)
    _, runner = served(family)
    tokens = torch.randint(0, 61, (3, 40))
    counts = (9, 30, 15)
    logits = runner.prefill([Chunk(row, tuple(tokens[row, :count].tolist())) for row, count in enumerate(counts)])
    for row, count in enumerate(counts):
        torch.testing.assert_close(logits[row], whole(family, tokens)[row, count - 1], rtol=0, atol=TOLERANCE)
