"""Whole models of S4, S4D and LSSL layers: states, packing, checkpoints, text, the printed summary, mistakes."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

import statespan
from statespan.errors import UserError
from statespan.layers.config import AttentionConfig, LSSLConfig, Mamba1Config, S4Config, S4DConfig
from statespan.models.accounting import count_parameters, state_bytes
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.models.summary import print_summary

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    layers=tuple(LayerSpec.from_text(text) for text in ("s4", "s4d", "mamba1", "attention", "lssl")),
    s4=S4Config(state_size=8),
    s4d=S4DConfig(state_size=6, block="h3", expand=2),
    lssl=LSSLConfig(state_size=4),
    mamba1=Mamba1Config(state_size=4),
    attention=AttentionConfig(num_heads=2, rope_theta=100.0),
)


@pytest.fixture
def model() -> LanguageModel:
    return build(CONFIG, seed=3, dtype=torch.float64).eval()


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_chunks_steps_packing_and_padding_equal_the_whole(model: LanguageModel) -> None:
    ids = torch.randint(0, 64, (1, 21))
    whole = model(ids).logits
    state, parts = model.new_state(1), []
    for piece in ids.split([7, 1, 1, 12], dim=1):
        output = model(piece, state=state)
        parts.append(output.logits)
        state = output.state
    close(torch.cat(parts, dim=1), whole)
    packed = model(torch.cat([ids[:, :5], ids], dim=1), segments=torch.tensor([[4] * 5 + [2] * 21])).logits
    close(packed[:, 5:], whole)
    mask = torch.tensor([[False] * 3 + [True] * 21])
    close(model(torch.nn.functional.pad(ids, (3, 0)), attention_mask=mask).logits[:, 3:], whole)


def test_a_checkpoint_gives_the_model_back(model: LanguageModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    back = statespan.load(tmp_path)
    assert back.config == CONFIG
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    with pytest.raises(UserError, match="save it with format='statespan'"):
        model.save(tmp_path / "theirs", format="transformers")


def test_generated_text_is_that_of_the_whole_model(model: LanguageModel) -> None:
    prompt = [5, 9, 33, 2]
    found = statespan.generate(model, prompt, max_new_tokens=12, temperature=0.0).token_ids
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for token in found:
            assert model(ids).logits[0, -1].argmax().item() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len(found) == 12


def test_counts_and_bytes(model: LanguageModel) -> None:
    assert count_parameters(CONFIG).total == sum(parameter.numel() for parameter in model.parameters())
    lasting = CONFIG.replace(layers=tuple(spec for spec in CONFIG.layers if spec.mixer != "attention"))
    state = build(lasting, dtype=torch.float32).new_state(1)
    assert state.num_bytes == state_bytes(lasting, 4)
    file = io.StringIO()
    print_summary(CONFIG, (1024,), title="foundations", console=Console(file=file))
    assert "1 x s4d" in file.getvalue()


@pytest.mark.parametrize("name", ["s4", "s4d", "lssl"])
def test_bfloat16_weights_leave_the_system_in_float32(name: str) -> None:
    config = CONFIG.replace(layers=(LayerSpec.from_text(name),))
    ids = torch.randint(0, 64, (2, 40))
    exact, rounded = build(config, seed=1), build(config, seed=1, dtype=torch.bfloat16)
    assert rounded.backbone.layers[0].mixer.C.dtype == torch.float32
    assert torch.equal(rounded.backbone.layers[0].mixer.log_dt, exact.backbone.layers[0].mixer.log_dt)
    with torch.no_grad():
        truth, found = exact(ids).logits, rounded(ids).logits.float()
    assert ((found - truth).norm() / truth.norm()).item() < 0.02


@pytest.mark.parametrize(
    ("layer", "changes", "message"),
    [
        ("s4", {"s4": S4Config(state_size=7)}, "ModelConfig.s4: state_size 7 must be even"),
        (
            "s4d",
            {"s4d": S4DConfig(state_size=0)},
            "ModelConfig.s4d: state_size, expand and conv_kernel must be at least 1",
        ),
        ("s4d", {"s4d": S4DConfig(expand=2)}, "expand 2 needs block 'h3' or 'mamba'; 'glu' has no in_proj"),
        ("lssl", {"lssl": LSSLConfig(dt_min=0.5)}, "dt_min 0.5 must be above 0 and at most dt_max 0.1"),
    ],
)
def test_mistakes_are_one_line(layer: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CONFIG.replace(layers=(LayerSpec.from_text(layer),), **changes)
    assert "\n" not in str(caught.value)


def test_unknown_blocks_offer_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mamba'"):
        ModelConfig.from_dict({"s4d": {"block": "mamba1"}})
