"""The small models of the synthetic tasks: two layers, from a layer pattern, one mixer or two."""

from statespan.errors import UserError
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, S4Config, S4DConfig, S6Config
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, MixerName

MODELS = {
    "mamba": "Mamba-1: the selective S6 in Mamba's block",
    "mamba2": "Mamba-2",
    "s4d_in_mamba": "S4D-Lin in Mamba's block: the same without selection",
    "s4_in_mamba": "S4 in Mamba's block",
    "h3": "S4D in H3's block",
    "h3_s6": "S6 in H3's block",
    "s4": "S4 without a gate from the input",
    "s6": "S6 in S4's block, without a gate from the input",
    "attention_rope": "attention with rotary positions",
    "attention_learned": "attention with learned positions",
    "attention": "attention without positions",
    "lstm": "LSTM",
    "hybrid": "one layer of Mamba-1, then one of attention without positions",
    "hybrid2": "one layer of Mamba-2, then one of attention without positions",
}
LAYERS: dict[str, tuple[MixerName, MixerName]] = {
    "mamba": ("mamba1", "mamba1"),
    "mamba2": ("mamba2", "mamba2"),
    "s4d_in_mamba": ("s4d", "s4d"),
    "s4_in_mamba": ("s4", "s4"),
    "h3": ("s4d", "s4d"),
    "h3_s6": ("s6", "s6"),
    "s4": ("s4", "s4"),
    "s6": ("s6", "s6"),
    "attention_rope": ("attention", "attention"),
    "attention_learned": ("attention", "attention"),
    "attention": ("attention", "attention"),
    "lstm": ("lstm", "lstm"),
    "hybrid": ("mamba1", "attention"),
    "hybrid2": ("mamba2", "attention"),
}


def task_model(
    name: str, *, vocab_size: int, hidden_size: int, state_size: int = 16, num_heads: int = 8, longest: int = 512
) -> ModelConfig:
    """Two layers of the model called `name` in MODELS, without feed-forward layers.

    Args:
        name: one of MODELS.
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        state_size: N of Mamba-1, Mamba-2 and S6; the S4 family has 64, as published.
        num_heads: of attention. Mamba-2 has heads of 16 channels or more.
        longest: tokens for which there are learned positions.
    Raises:
        UserError: a state size or width that cannot work.
    """
    if min(hidden_size, state_size) < 1:
        raise UserError(f"hidden_size and state_size must be at least 1, got {hidden_size} and {state_size}")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(LayerSpec(mixer) for mixer in LAYERS[name]),
        mamba1=Mamba1Config(state_size=state_size),
        mamba2=Mamba2Config(state_size=state_size, head_dim=max(16, hidden_size // 4)),
        attention=AttentionConfig(
            num_heads=num_heads,
            rope_theta=10_000.0 if name == "attention_rope" else None,
            learned_positions=longest if name == "attention_learned" else None,
        ),
        s4=S4Config(block="mamba", expand=2) if name == "s4_in_mamba" else S4Config(),
        s4d=S4DConfig(block="h3") if name == "h3" else S4DConfig(block="mamba", expand=2),
        s6=S6Config(state_size=state_size, block="h3" if name == "h3_s6" else "glu"),
    )
