"""The published sizes of the family as rows of data, and `preset(name)` that turns a row into a ModelConfig.

A row is what the paper or the released config says. Token ids are those of the tokenizer that the sizes were trained
with: GPT-NeoX (Mamba, Mamba-2, BlackMamba), GPT-2 (MoE-Mamba), the models' own (Jamba, Llama, Mixtral), or bytes.
"""

from dataclasses import dataclass
from typing import Any

from statespan.errors import UnknownName
from statespan.layers.config import (
    AttentionConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    RecurrentConfig,
    S4Config,
    S4DConfig,
)
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, pattern_from_periods, pattern_from_text


@dataclass(frozen=True)
class Preset:
    """A row: what it is in one line, and the config."""

    summary: str
    config: ModelConfig


NEOX: dict[str, Any] = {"vocab_size": 50277, "eos_token_ids": (0,)}
GPT2: dict[str, Any] = {"vocab_size": 50257, "eos_token_ids": (50256,)}
BYTES: dict[str, Any] = {"vocab_size": 256}
JAMBA: dict[str, Any] = {
    "vocab_size": 65536,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
    "tie_embeddings": False,
}
JAMBA_15 = JAMBA | {"eos_token_ids": (2, 518)}
LLAMA: dict[str, Any] = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_ids": (2,), "tie_embeddings": False}

# name: (layers, hidden size)
MAMBA = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "1.4b": (48, 2048), "2.8b": (64, 2560)}
MAMBA2 = {"130m": (24, 768), "370m": (48, 1024), "780m": (48, 1536), "1.3b": (48, 2048), "2.7b": (64, 2560)}
MAMBABYTE = {"353m": (53, 1024), "972m": (48, 1792), "1.6b": (48, 2304)}

# name: (layers, hidden size, heads, intermediate size); the Mamba paper's GPT-3 shapes with a SwiGLU of equal work
TRANSFORMER = {
    "130m": (12, 768, 12, 2048),
    "370m": (24, 1024, 16, 2816),
    "790m": (24, 1536, 16, 4096),
    "1.4b": (24, 2048, 32, 5504),
    "2.8b": (32, 2560, 32, 6912),
}

# name: (hidden size, Mamba blocks, Transformer blocks, heads); half as many Mamba blocks where the rest are experts
MOE_MAMBA = {"25m": (512, 16, 8, 8), "100m": (768, 32, 16, 12)}

# name: (layers, hidden size, intermediate size); Mamba and MoE layers alternate
BLACKMAMBA = {"340m-1.5b": (30, 1152, 3072), "630m-2.8b": (36, 1472, 3872)}

MAMBA2_ATTENTION_LAYERS = (9, 18, 27, 36, 45, 56)
HYBRID_8B = "M+M+M++M+M*+M+M+M+M++M*+M+M+M+M+M*++M+M+M+M+M*+M++M+M+M+"


def _repeat(layer: str, count: int) -> tuple[LayerSpec, ...]:
    return (LayerSpec.from_text(layer),) * count


def _mamba_rows() -> dict[str, Preset]:
    rows = {
        f"mamba-{name}": Preset(
            "Mamba-1, state-spaces (arXiv 2312.00752)",
            ModelConfig(**NEOX, vocab_multiple=8, hidden_size=hidden, layers=_repeat("mamba1", depth)),
        )
        for name, (depth, hidden) in MAMBA.items()
    }
    rows |= {
        f"mamba2-{name}": Preset(
            "Mamba-2, state-spaces (arXiv 2405.21060)",
            ModelConfig(**NEOX, vocab_multiple=16, hidden_size=hidden, layers=_repeat("mamba2", depth)),
        )
        for name, (depth, hidden) in MAMBA2.items()
    }
    rows["mamba2attn-2.7b"] = Preset(
        "Mamba-2 with 6 attention layers, state-spaces (arXiv 2405.21060)",
        ModelConfig(
            **NEOX,
            vocab_multiple=16,
            hidden_size=2560,
            layers=tuple(LayerSpec("attention" if i in MAMBA2_ATTENTION_LAYERS else "mamba2") for i in range(64)),
            attention=AttentionConfig(num_heads=30, head_dim=128, rope_theta=10_000.0, rotary_dim=64, conv_kernel=4),
        ),
    )
    rows |= {
        f"mambabyte-{name}": Preset(
            "Mamba-1 on raw bytes (arXiv 2401.13660)",
            ModelConfig(**BYTES, hidden_size=hidden, layers=_repeat("mamba1", depth)),
        )
        for name, (depth, hidden) in MAMBABYTE.items()
    }
    return rows


def _jamba(
    tokens: dict[str, Any],
    depth: int,
    hidden: int,
    intermediate: int,
    *,
    heads: int,
    kv_heads: int,
    experts: int,
    attention: tuple[int, int] = (8, 4),  # period and offset
) -> ModelConfig:
    return ModelConfig(
        **tokens,
        hidden_size=hidden,
        layers=pattern_from_periods(
            depth, attention_period=attention[0], attention_offset=attention[1], expert_period=2, expert_offset=1
        ),
        mamba1=Mamba1Config(inner_norms=True),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=kv_heads),
        mlp=MLPConfig(intermediate),
        moe=MoEConfig(experts, top_k=2, intermediate_size=intermediate, load_balance_coef=0.001),
        norm_epsilon=1e-6,
    )


def _jamba_rows() -> dict[str, Preset]:
    return {
        "jamba-v0.1": Preset(
            "Jamba, 52B with 12B active, AI21 (arXiv 2403.19887)",
            _jamba(JAMBA, 32, 4096, 14336, heads=32, kv_heads=8, experts=16),
        ),
        "jamba-1.5-mini": Preset(
            "Jamba-1.5 Mini, the shape of v0.1, AI21 (arXiv 2408.12570)",
            _jamba(JAMBA_15, 32, 4096, 14336, heads=32, kv_heads=8, experts=16),
        ),
        "jamba-1.5-large": Preset(
            "Jamba-1.5 Large, 398B with 94B active, AI21 (arXiv 2408.12570)",
            _jamba(JAMBA_15, 72, 8192, 24576, heads=64, kv_heads=8, experts=16),
        ),
        "jamba-tiny-dev": Preset(
            "Jamba at 319M, the shape of AI21's development checkpoint Jamba-tiny-dev",
            _jamba(JAMBA, 16, 512, 2048, heads=8, kv_heads=2, experts=8),
        ),
        "jamba-102m": Preset(
            "Jamba at 102M with 8 layers and 8 experts, for the CPU benchmarks",
            _jamba(JAMBA | {"vocab_size": 32000}, 8, 512, 1024, heads=8, kv_heads=2, experts=8),
        ),
        "jamba-tiny": Preset(
            "Jamba at 20M for tests: the layout of AI21's Jamba-tiny-random, intermediate size our own",
            _jamba(JAMBA, 8, 128, 256, heads=4, kv_heads=1, experts=4, attention=(4, 2)),
        ),
        "jamba-demo": Preset(
            "Jamba on bytes, small enough to train on two cores in minutes",
            ModelConfig(
                **BYTES,
                hidden_size=192,
                layers=tuple(map(LayerSpec.from_text, ("mamba1+mlp", "mamba1+moe", "attention+mlp", "mamba1+moe"))),
                mamba1=Mamba1Config(state_size=8, inner_norms=True),
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, sliding_window=512),
                mlp=MLPConfig(384),
                moe=MoEConfig(num_experts=4, top_k=1, intermediate_size=384, load_balance_coef=0.001),
            ),
        ),
    }


def _moe_mamba_rows() -> dict[str, Preset]:
    rows: dict[str, Preset] = {}
    for name, (hidden, mamba_depth, depth, heads) in MOE_MAMBA.items():
        attention = AttentionConfig(heads, rope_theta=10_000.0)
        switch: dict[str, Any] = {
            "top_k": 1,
            "activation": "relu",
            "capacity_factor": 1.0,
            "load_balance_coef": 0.01,
        }
        rows[f"mamba-{name}"] = Preset(
            f"the dense partner of moe-mamba-{name} (arXiv 2401.04081)",
            ModelConfig(**GPT2, hidden_size=hidden, layers=_repeat("mamba1", mamba_depth)),
        )
        rows[f"moe-mamba-{name}"] = Preset(
            "Mamba with Switch experts (arXiv 2401.04081); its name counts active parameters, without embeddings",
            ModelConfig(
                **GPT2,
                hidden_size=hidden,
                layers=_repeat("mamba1+moe", mamba_depth // 2),
                moe=MoEConfig(num_experts=42, intermediate_size=3 * hidden, **switch),
            ),
        )
        rows[f"transformer-{name}"] = Preset(
            f"the dense Transformer beside moe-mamba-{name} (arXiv 2401.04081)",
            ModelConfig(
                **GPT2,
                hidden_size=hidden,
                layers=_repeat("attention+mlp", depth),
                attention=attention,
                mlp=MLPConfig(4 * hidden, activation="relu"),
            ),
        )
        rows[f"transformer-moe-{name}"] = Preset(
            f"the Switch Transformer beside moe-mamba-{name} (arXiv 2401.04081)",
            ModelConfig(
                **GPT2,
                hidden_size=hidden,
                layers=_repeat("attention+moe", depth),
                attention=attention,
                moe=MoEConfig(num_experts=32, intermediate_size=4 * hidden, **switch),
            ),
        )
    return rows


def _blackmamba_rows() -> dict[str, Preset]:
    return {
        f"blackmamba-{name}": Preset(
            "BlackMamba, active-total parameters, Zyphra (arXiv 2402.01771)",
            ModelConfig(
                **NEOX,
                vocab_multiple=128,
                hidden_size=hidden,
                layers=(LayerSpec("mamba1"), LayerSpec(None, "moe")) * (depth // 2),
                moe=MoEConfig(
                    num_experts=8,
                    top_k=1,
                    intermediate_size=intermediate,
                    activation="geglu",  # what the released code applies, though its flag is called swiglu
                    router_bias=True,
                    score_function="sigmoid",
                    balancing="sinkhorn",
                ),
                final_norm="layer",
            ),
        )
        for name, (depth, hidden, intermediate) in BLACKMAMBA.items()
    }


def _hybrid_rows() -> dict[str, Preset]:
    return {
        "mamba2-hybrid-8b": Preset(
            "24 Mamba-2, 4 attention and 28 MLP layers, NVIDIA (arXiv 2406.07887)",
            ModelConfig(
                vocab_size=256_000,
                tie_embeddings=False,
                hidden_size=4096,
                layers=pattern_from_text(HYBRID_8B),
                mamba2=Mamba2Config(num_groups=8),
                attention=AttentionConfig(num_heads=32, num_kv_heads=8),
                mlp=MLPConfig(16384, activation="gelu"),
            ),
        )
    }


def _transformer_rows() -> dict[str, Preset]:
    rows = {
        f"transformer-{name}": Preset(
            f"Llama-style Transformer about the size of mamba-{name}",
            ModelConfig(
                **NEOX,
                vocab_multiple=8,
                hidden_size=hidden,
                layers=_repeat("attention+mlp", depth),
                attention=AttentionConfig(heads, rope_theta=10_000.0),
                mlp=MLPConfig(intermediate),
            ),
        )
        for name, (depth, hidden, heads, intermediate) in TRANSFORMER.items()
    }
    rows["llama-2-7b"] = Preset(
        "Llama 2, Meta (arXiv 2307.09288)",
        ModelConfig(
            **LLAMA,
            hidden_size=4096,
            layers=_repeat("attention+mlp", 32),
            attention=AttentionConfig(32, rope_theta=10_000.0),
            mlp=MLPConfig(11008),
        ),
    )
    rows["mistral-7b"] = Preset(
        "Mistral v0.1 with its sliding window of 4096 (arXiv 2310.06825)",
        ModelConfig(
            **LLAMA,
            hidden_size=4096,
            layers=_repeat("attention+mlp", 32),
            attention=AttentionConfig(32, num_kv_heads=8, rope_theta=10_000.0, sliding_window=4096),
            mlp=MLPConfig(14336),
        ),
    )
    rows["mixtral-8x7b"] = Preset(
        "Mixtral, 47B with 13B active, Mistral (arXiv 2401.04088)",
        ModelConfig(
            **LLAMA,
            hidden_size=4096,
            layers=_repeat("attention+moe", 32),
            attention=AttentionConfig(32, num_kv_heads=8, rope_theta=1e6),
            moe=MoEConfig(8, top_k=2, intermediate_size=14336, renormalize=True, load_balance_coef=0.02),
        ),
    )
    return rows


def _recurrent_rows() -> dict[str, Preset]:
    """The recurrent layers before Mamba, about the size of mamba-130m."""
    neox: dict[str, Any] = NEOX | {"vocab_multiple": 8}
    rows = {
        f"{kind}-130m": Preset(
            f"{depth} residual {kind.upper()} layers, about the size of mamba-130m",
            ModelConfig(**neox, hidden_size=1024, layers=_repeat(kind, depth), recurrent=RecurrentConfig()),
        )
        for kind, depth in (("lstm", 9), ("gru", 12))
    }
    rows["s4-130m"] = Preset(
        "Mamba's block round S4 (arXiv 2111.00396), about the size of mamba-130m",
        ModelConfig(**neox, hidden_size=768, layers=_repeat("s4", 24), s4=S4Config(block="mamba", expand=2)),
    )
    rows["s4d-130m"] = Preset(
        "Mamba's block round S4D (arXiv 2206.11893), about the size of mamba-130m",
        ModelConfig(**neox, hidden_size=768, layers=_repeat("s4d", 24), s4d=S4DConfig(block="mamba", expand=2)),
    )
    return rows


PRESETS: dict[str, Preset] = {
    **_mamba_rows(),
    **_jamba_rows(),
    **_moe_mamba_rows(),
    **_blackmamba_rows(),
    **_hybrid_rows(),
    **_transformer_rows(),
    **_recurrent_rows(),
}


def presets() -> dict[str, str]:
    """Every preset's name with what it is in one line.

    Example:
        >>> presets()["jamba-v0.1"]
        'Jamba, 52B with 12B active, AI21 (arXiv 2403.19887)'
    """
    return {name: row.summary for name, row in PRESETS.items()}


def preset(name: str) -> ModelConfig:
    """The config called `name`.

    Raises:
        UnknownName: no preset has that name; the message offers the nearest.

    Example:
        >>> len(preset("mamba-130m").layers)
        24
    """
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return PRESETS[name].config
