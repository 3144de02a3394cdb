"""Small models of every family, for the tests of what serves them."""

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

PLAIN = AttentionConfig(num_heads=4, num_kv_heads=2)
BASE = ModelConfig(
    vocab_size=61,
    vocab_multiple=8,
    hidden_size=32,
    mamba1=Mamba1Config(state_size=5, inner_norms=True),
    mamba2=Mamba2Config(head_dim=16, state_size=12, chunk_size=8),
    attention=PLAIN,
    mlp=MLPConfig(intermediate_size=40),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24),
    s4d=S4DConfig(state_size=8, block="h3"),
    recurrent=RecurrentConfig(),
)
FAMILIES: dict[str, tuple[tuple[str, ...], AttentionConfig]] = {
    "mamba1": (("mamba1", "mamba1"), PLAIN),
    "mamba2": (("mamba2", "mamba2+mlp"), PLAIN),
    "hybrid": (("mamba1+moe", "attention+mlp", "mamba2+moe", "mlp", "attention"), PLAIN),
    "attention": (
        ("attention+mlp", "attention"),
        AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=100.0, conv_kernel=3, learned_positions=4096),
    ),
    "window": (
        ("attention+mlp", "mamba1", "attention"),
        AttentionConfig(num_heads=4, rope_theta=100.0, sliding_window=7),
    ),
    "recurrent": (("lstm+mlp", "gru"), PLAIN),
    "time invariant": (("s4+mlp", "s4d", "lssl", "s6"), PLAIN),
}


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's LSTM and GRU round to TF32 unless told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def built(name: str) -> LanguageModel:
    """In float32."""
    layers, attention = FAMILIES[name]
    config = BASE.replace(layers=tuple(LayerSpec.from_text(text) for text in layers), attention=attention)
    return build(config, seed=1, device="cuda" if torch.cuda.is_available() else "cpu").eval()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of each family in turn."""
    return built(request.param)


@pytest.fixture(scope="module")
def hybrid() -> LanguageModel:
    """A model with every kind of memory."""
    return built("hybrid")


@pytest.fixture(scope="module")
def window() -> LanguageModel:
    """A model whose attention sees 7 tokens, with mixers that weigh more, so that tokens depend on the past."""
    model = built("window")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
    return model
