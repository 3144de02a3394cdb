"""Held-out bits per byte against a plain count, document by document, with the whole document as context."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from statespan.checkpoints import ByteTokenizer
from statespan.layers.kv_cache import KVCache
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel, LanguageModelOutput
from statespan.training import EvaluationConfig, evaluate
from statespan.training.data import Corpus, build_corpus


@pytest.fixture
def model(hybrid: ModelConfig) -> LanguageModel:
    """A model sure enough of itself that context matters."""
    model = build(hybrid, seed=1).double()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


@pytest.fixture
def corpus(make_text: Callable[[int, int], str]) -> Corpus:
    """Documents of 1, 2, ... bytes up to some tens."""
    return build_corpus(["a", "bc", *(make_text(i, n) for i, n in enumerate((1, 3, 8, 9, 2)))], ByteTokenizer())


def plain_bits(model: LanguageModel, ids: torch.Tensor) -> float:
    """Bits of one document in one forward: 8 for its first byte, -log2 p for the others."""
    model.eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    return 8 + functional.cross_entropy(logits, ids[1:], reduction="sum").item() / math.log(2)


def documents(corpus: Corpus) -> list[torch.Tensor]:
    return [torch.from_numpy(corpus.document(i).astype("int64")) for i in range(len(corpus))]


@pytest.mark.parametrize(("batch_size", "chunk_length"), [(1, 512), (3, 512), (3, 7), (16, 1), (16, 5)])
def test_equals_the_plain_count_whatever_the_batches_and_chunks(
    model: LanguageModel, corpus: Corpus, batch_size: int, chunk_length: int
):
    wanted = sum(plain_bits(model, ids) for ids in documents(corpus))
    config = EvaluationConfig(batch_size=batch_size, chunk_length=chunk_length)
    result = evaluate(model, corpus, config)
    assert result.bits_per_byte * corpus.num_bytes == pytest.approx(wanted, rel=1e-6)
    assert (result.num_bytes, result.num_documents) == (corpus.num_bytes, len(corpus))
    assert result.num_predicted == corpus.num_bytes - len(corpus)
    assert result.loss * result.num_predicted == pytest.approx((wanted - 8 * len(corpus)) * math.log(2), rel=1e-6)


def test_context_length_restarts_the_state_and_still_counts_every_byte(model: LanguageModel, corpus: Corpus):
    length, wanted = 6, 0.0
    for ids in documents(corpus):
        wanted += 8
        for start in range(0, len(ids) - 1, length - 1):
            wanted += plain_bits(model, ids[start : start + length]) - 8
    result = evaluate(model, corpus, EvaluationConfig(context_length=length, batch_size=4, chunk_length=4))
    assert result.bits_per_byte * corpus.num_bytes == pytest.approx(wanted, rel=1e-6)
    assert result.num_predicted == corpus.num_bytes - len(corpus)
    whole = evaluate(model, corpus, EvaluationConfig())
    assert abs(result.bits_per_byte - whole.bits_per_byte) > 1e-3  # the context did matter


def test_blind_model_needs_eight_bits(hybrid: ModelConfig, corpus: Corpus):
    model = build(hybrid)
    with torch.no_grad():
        model.final_norm.weight.zero_()
    assert evaluate(model, corpus).bits_per_byte == pytest.approx(8.0)


def test_first_bytes_and_special_tokens_of_a_subword_corpus(model: LanguageModel):
    ids = torch.tensor([3, 9, 27, 81, 243, 1])
    with_begin = Corpus(ids.numpy().astype("uint16"), torch.tensor([0, 4, 2, 0, 3, 0]).numpy(), *_one(6))
    without = Corpus(ids.numpy().astype("uint16"), torch.tensor([5, 4, 2, 0, 3, 0]).numpy(), *_one(6))
    nats_bits = plain_bits(model, ids) - 8
    assert evaluate(model, with_begin).bits_per_byte == pytest.approx(nats_bits / 9, rel=1e-6)
    assert evaluate(model, without).bits_per_byte == pytest.approx((nats_bits + 8 * 5) / 14, rel=1e-6)


def _one(length: int):
    return torch.tensor([0]).numpy(), torch.tensor([length]).numpy()


def test_leaves_the_model_as_it_was_and_reports_progress(model: LanguageModel, corpus: Corpus):
    shares = list[float]()
    model.train()
    evaluate(model, corpus, EvaluationConfig(batch_size=2, chunk_length=8), on_progress=shares.append)
    assert model.training
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(parameter.grad is None for parameter in model.parameters())

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, corpus, on_progress=stop)
    assert model.training


def test_capacity_of_experts_does_not_count(corpus: Corpus, hybrid: ModelConfig):
    tight = replace(hybrid, moe=replace(hybrid.moe, capacity_factor=0.25))
    assert evaluate(build(tight), corpus).bits_per_byte == evaluate(build(hybrid), corpus).bits_per_byte


def test_bfloat16_is_close(hybrid: ModelConfig, corpus: Corpus):
    model = build(hybrid, seed=1)
    full, half = evaluate(model, corpus), evaluate(model, corpus, precision=torch.bfloat16)
    assert half.bits_per_byte == pytest.approx(full.bits_per_byte, rel=0.01)
    assert half.bits_per_byte != full.bits_per_byte


def test_a_window_bounds_what_long_documents_beside_short_ones_keep(
    hybrid: ModelConfig, make_text: Callable[[int, int], str]
):
    config = hybrid.replace(attention=replace(hybrid.attention, sliding_window=8))
    model, slots = build(config, seed=1), list[int]()

    def count(module: torch.nn.Module, inputs: object, output: LanguageModelOutput) -> None:
        assert output.state is not None
        slots.extend(layer.key.shape[1] for layer in output.state.layers if isinstance(layer, KVCache))

    model.register_forward_hook(count)
    texts = build_corpus([make_text(0, 60), make_text(1, 2), make_text(2, 20)], ByteTokenizer())
    assert max(texts.lengths) > 400
    evaluate(model, texts, EvaluationConfig(chunk_length=16))
    assert slots and max(slots) == 64  # the smallest buffer there is
