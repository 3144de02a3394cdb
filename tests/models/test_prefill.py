"""Chunks of prompts on memory that stays where it is, padded to a few lengths: what the model's own forward gives."""

from itertools import pairwise

import pytest
import torch

from statespan.layers.config import Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.layers.state import ModelState
from statespan.models import prefill
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.models.prefill import MOST_TOKENS, SIZES, Prefiller, capturable

NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
LAYERS = {"mamba1": ("mamba1", "mamba1+mlp"), "mamba2": ("mamba2+mlp", "mamba2"), "moe": ("mamba1+moe", "mamba1")}


def small(name: str, device: str = "cpu") -> LanguageModel:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=32,
        mamba1=Mamba1Config(state_size=8, inner_norms=True),
        mamba2=Mamba2Config(head_dim=16, state_size=16, chunk_size=16),
        mlp=MLPConfig(intermediate_size=40),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24),
        layers=tuple(LayerSpec.from_text(text) for text in LAYERS[name]),
    )
    return build(config, seed=1).to(device).eval()


def prefiller_of(model: LanguageModel, num_rows: int) -> Prefiller:
    return Prefiller(model.embedding, model.backbone, model.stream_dtype, model.new_state(num_rows))


def tensors_of(state: ModelState | None) -> list[torch.Tensor]:
    assert state is not None
    return [tensor for layer in state.layers if layer is not None for tensor in layer.tensors().values()]


def check_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_chunks_are_what_the_forward_gives(name: str, device: str) -> None:
    """Sizes with and without padding, as they are, captured and replayed, from a state that is not zero."""
    model = small(name, device)
    prefiller = prefiller_of(model, 2)
    for lengths in ([64, 1, 63], [65, 64], [64, 3, 64], [5], [130, 64, 65], [700], [5]):
        ids = torch.randint(0, 61, (2, sum(lengths)))
        before = model(torch.randint(0, 61, (2, 7), device=device), state=model.new_state(2)).state
        kept = [tensor.clone() for tensor in tensors_of(before)]
        expected = model(ids.to(device), state=before, logits_at="last")
        prefiller.start(before)
        hidden = [prefiller.feed(chunk) for chunk in ids.split(lengths, 1)][-1]
        check_close([model.head(hidden)], [expected.logits])
        state = prefiller.state()
        prefiller.start(model.new_state(2))  # what was given out stays
        prefiller.feed(ids[:, :3])
        check_close(tensors_of(state), tensors_of(expected.state))
        assert all(map(torch.equal, tensors_of(before), kept))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_padding_of_the_prompts_is_not_seen(name: str, device: str) -> None:
    model = small(name, device)
    prefiller = prefiller_of(model, 2)
    for length in (64, 64, 50, 64, 600):
        ids, real = torch.randint(0, 61, (2, length)), torch.ones(2, length, dtype=torch.bool)
        real[1, :20] = False
        prefiller.start(model.new_state(2))
        logits = model.head(prefiller.feed(ids, real))
        for row, first in ((0, 0), (1, 20)):
            alone = model(ids[row : row + 1, first:].to(device), logits_at="last").logits
            check_close([logits[row : row + 1]], [alone])


def test_a_chunk_is_padded_to_the_next_size() -> None:
    """A step up is at most 128 tokens, or a quarter of the size below."""
    assert SIZES[-1] == MOST_TOKENS and SIZES[0] == 64
    for size, above in pairwise(SIZES):
        assert above % 64 == 0 and 0 < above - size <= max(128, size // 4)


def test_every_length_goes_to_the_least_size_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chunk:
        def __init__(self, prefiller: Prefiller, num_rows: int, size: int, padded: bool) -> None:
            self.size, self.padded = size, padded

        def __call__(self, ids: torch.Tensor, real: torch.Tensor | None) -> tuple[int, bool]:
            return self.size, self.padded

    monkeypatch.setattr(prefill, "_Chunk", Chunk)
    prefiller = prefiller_of(small("mamba1"), 1)
    for length in range(1, MOST_TOKENS + 1):
        ids, real = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=torch.bool)
        least = min(size for size in SIZES if size >= length)
        assert prefiller.feed(ids) == prefiller.feed(ids, real) == (least, length < least)
        real[:, 0] = False
        assert prefiller.feed(ids, real) == (least, True)


def test_what_is_worth_a_graph() -> None:
    assert Prefiller.serves(1, SIZES[-1]) and Prefiller.serves(MOST_TOKENS // 256, 256)
    assert not Prefiller.serves(1, SIZES[-1] + 1) and not Prefiller.serves(MOST_TOKENS // 256 + 1, 256)


def test_which_blocks_a_graph_can_hold() -> None:
    assert all(capturable(block) for name in ("mamba1", "mamba2") for block in small(name).layers)
    assert [capturable(block) for block in small("moe").layers] == [False, True]
    assert small("mamba1").prefiller(1) is None  # on a CPU
