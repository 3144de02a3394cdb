"""The Decoder against the model's own forward, token by token."""

import pytest
import torch

from statespan.layers.config import (
    AttentionConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    RecurrentConfig,
    S4DConfig,
)
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.models.quantize import quantize

BASE = ModelConfig(
    vocab_size=61,
    vocab_multiple=8,
    hidden_size=32,
    mamba1=Mamba1Config(state_size=5, inner_norms=True),
    mamba2=Mamba2Config(head_dim=16, state_size=12, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=100.0, conv_kernel=2),
    mlp=MLPConfig(intermediate_size=40),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24),
    s4d=S4DConfig(state_size=8, block="h3"),
    recurrent=RecurrentConfig(),
)
LAYERS = {
    "mamba1": ("mamba1", "mamba1"),
    "mamba2": ("mamba2", "mamba2+mlp"),
    "hybrid": ("mamba1+moe", "attention+mlp", "mamba2+moe", "mlp", "moe"),
    "attention": ("attention+mlp", "attention"),
    "recurrent": ("lstm+mlp", "gru"),
    "time invariant": ("s4+mlp", "s4d", "lssl"),
}


def small(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    config = BASE.replace(layers=tuple(LayerSpec.from_text(text) for text in LAYERS[name]), **changes)
    return build(config, seed=1, dtype=dtype).eval()


@torch.inference_mode()
def largest_difference(model: LanguageModel, rows: int = 3, length: int = 7) -> float:
    """Between the decoder's logits and those of one forward, of the largest; the states must agree too."""
    tokens = torch.randint(0, 61, (rows, 4 + length))
    state = model(tokens[:, :4], state=model.new_state(rows)).state
    whole = model(tokens[:, 4:], state=state)
    decoder = model.decoder(rows)
    decoder.start(state)
    found = [decoder(ids) for ids in tokens[:, 4:].unbind(1)]
    state = decoder.state()
    for layer, truth in zip(state.layers, whole.state.layers, strict=True):
        if layer is not None and hasattr(layer, "ssm"):
            torch.testing.assert_close(layer.ssm, truth.ssm, rtol=0.05, atol=0.05 * float(truth.ssm.abs().max()))
    assert state.layers[0].row_shape == whole.state.layers[0].row_shape
    return ((torch.stack(found, 1) - whole.logits).abs().max() / whole.logits.abs().max()).item()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "final_norm": "layer"}], ids=["plain", "untied"])
@pytest.mark.parametrize("name", LAYERS)
def test_decoder_equals_forward(name: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    assert largest_difference(small(name, **changes)) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 20])
def test_any_batch_size(rows: int) -> None:
    torch.manual_seed(1)
    assert largest_difference(small("hybrid"), rows) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"residual_float32": True}], ids=["plain", "float32 residual"])
@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_within_its_rounding(name: str, changes: dict[str, object]) -> None:
    torch.manual_seed(2)
    assert largest_difference(small(name, torch.bfloat16, **changes)) < 0.03


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "hybrid"])
def test_quantised_models_decode_as_their_forward(name: str) -> None:
    torch.manual_seed(3)
    assert largest_difference(quantize(small(name))) < 1e-5


def test_states_are_values() -> None:
    """Decoding twice from one state gives the same twice, and another decoder's calls in between change nothing."""
    torch.manual_seed(4)
    model = small("hybrid")
    with torch.inference_mode():
        state = model(torch.randint(0, 61, (2, 5)), state=model.new_state(2)).state
        decoder, other, ids = model.decoder(2), model.decoder(2), torch.tensor([3, 4])
        decoder.start(state)
        first, after = decoder(ids), decoder.state()
        other.start(after)
        other(torch.tensor([8, 9]))
        decoder.start(state)
        assert torch.equal(first, decoder(ids))


def test_quantised_experts_are_near() -> None:
    """int8 experts change the logits by a rounding, not more; the int8 prefill equals float64 of the same numbers."""
    torch.manual_seed(5)
    model, tokens = small("hybrid"), torch.randint(0, 61, (2, 9))
    with torch.inference_mode():
        before = model(tokens).logits
        after = quantize(model)(tokens).logits
    assert 0 < (after - before).norm() / before.norm() < 0.02
    assert model.layers[0].feed_forward.experts.up_proj.dtype == torch.int8


def set_aside(model: LanguageModel) -> LanguageModel:
    """Its parameters begin 4 bytes behind multiples of 16, as views into one memory of all may."""
    for parameter in model.parameters():
        values, skipped = parameter.data, 4 // parameter.element_size()
        memory = values.new_zeros(values.numel() + skipped)
        parameter.data = memory[skipped:].view(values.shape).copy_(values)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("name", ["mamba1", "mamba2", "hybrid"])
def test_parameters_that_begin_anywhere(name: str, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    model = set_aside(small(name, dtype, hidden_size=64).to(device))
    with torch.device(device):
        for rows in (1, 3, 20):
            assert largest_difference(model, rows) < (1e-4 if dtype == torch.float32 else 0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 9, 70])
def test_blocks_that_are_one_call_on_a_gpu(rows: int, aside: bool) -> None:
    """Mamba-1 blocks in a row, between others."""
    torch.manual_seed(6)
    layers = ("mamba1+mlp", "mamba1", "mamba1", "mamba1", "mlp", "mamba1")
    config = BASE.replace(
        hidden_size=512,
        mamba1=Mamba1Config(dt_rank=32),
        mlp=MLPConfig(intermediate_size=256),
        layers=tuple(LayerSpec.from_text(text) for text in layers),
    )
    model = build(config, seed=1, dtype=torch.bfloat16, device="cuda").eval()
    model = set_aside(model) if aside else model
    with torch.device("cuda"):
        assert largest_difference(model, rows) < 0.03
