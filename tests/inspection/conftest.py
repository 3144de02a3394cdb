"""One tiny model with a layer of every kind."""

import pytest
import torch

from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.layers.config import (
    AttentionConfig,
    LSSLConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    S4Config,
    S4DConfig,
)
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec

KINDS = ("mamba1+moe", "mamba2+mlp", "attention+moe", "s4", "s4d", "lssl", "lstm", "mlp")


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    config = ModelConfig(
        hidden_size=16,
        layers=tuple(LayerSpec.from_text(kind) for kind in KINDS),
        mamba1=Mamba1Config(state_size=4, inner_norms=True),
        mamba2=Mamba2Config(state_size=6, head_dim=8, num_groups=2),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=100.0),
        s4=S4Config(state_size=8),
        s4d=S4DConfig(state_size=8, init="legs"),
        lssl=LSSLConfig(state_size=4),
        mlp=MLPConfig(24),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16),
    )
    model = build(config, seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double() * 0.1)
    model.tokenizer = ByteTokenizer()
    return model.eval()
