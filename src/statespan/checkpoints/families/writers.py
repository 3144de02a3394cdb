"""Which family of transformers a model is saved as."""

from statespan.checkpoints.families.family import NATIVE_HINT, Family
from statespan.checkpoints.families.jamba import JAMBA
from statespan.checkpoints.families.mamba import MAMBA, MAMBA2
from statespan.checkpoints.families.transformer import LLAMA, MISTRAL, MIXTRAL
from statespan.errors import CheckpointError
from statespan.models.config import ModelConfig


def transformers_family(config: ModelConfig) -> Family:
    """The family whose layers these are.

    Raises:
        CheckpointError: transformers has no model of such layers.
    """
    kinds = {(spec.mixer, spec.feed_forward) for spec in config.layers}
    mixers = {mixer for mixer, _ in kinds}
    rotary = config.attention.rope_theta is not None
    if kinds == {("mamba1", None)}:
        return MAMBA
    if kinds == {("mamba2", None)}:
        return MAMBA2
    if kinds == {("attention", "mlp")} and rotary:
        return MISTRAL if config.attention.sliding_window else LLAMA
    if kinds == {("attention", "moe")} and rotary:
        return MIXTRAL
    if mixers <= {"mamba1", "attention"} and all(feed_forward for _, feed_forward in kinds):
        return JAMBA
    names = sorted({str(spec) for spec in config.layers})
    what = f"mixes the layers {', '.join(names)}" if len(names) > 1 else f"has {names[0]} layers"
    raise CheckpointError(f"this model {what}, and transformers has no such model; {NATIVE_HINT}")
