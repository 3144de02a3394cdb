"""Weight-only int8 for inference: linear layers, experts and the head, one scale an output row."""

from torch import nn

from statespan.layers.linear import Int8Linear, Linear
from statespan.layers.moe import Experts, Int8Experts
from statespan.models.language_model import LanguageModel


def quantize(model: LanguageModel) -> LanguageModel:
    """Replace the linear layers and experts of `model` by int8 ones, in place, and return it. For inference only.

    The weights become 1 byte each with a float32 scale an output row (symmetric, round to nearest, no calibration);
    activations keep their dtype. Embedding, convolutions, norms and routers stay as they are.

    Example:
        >>> import statespan
        >>> model = statespan.quantize(statespan.build("mamba-130m"))
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, Int8Linear(child.weight, child.bias))
            elif isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
    if model.config.tie_embeddings:
        model.lm_head = Int8Linear(model.embedding.weight)
    return model.requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` was applied."""
    return any(isinstance(module, (Int8Linear, Int8Experts)) for module in model.modules())
