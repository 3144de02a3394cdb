"""Weight-only quantisation for inference: int8 rows in our own kernels, int4 groups through torchao."""

from typing import Literal, get_args

import torch
from torch import nn

from statespan.errors import UnknownName
from statespan.layers.linear import Int4Linear, Int8Linear, Linear, int4_group_size
from statespan.layers.moe import Experts, Int8Experts
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel

Quantization = Literal["int8", "experts_int8", "int4"]
MODES: tuple[Quantization, ...] = get_args(Quantization)


def quantize(model: LanguageModel, mode: Quantization = "int8") -> LanguageModel:
    """Replace linear layers and experts of `model` by quantised ones, in place, and return it. For inference only.

    Activations keep their dtype; embedding, convolutions, norms and routers stay as they are. No calibration.

    Args:
        model: in float32 or bfloat16.
        mode: "int8": all linear layers, the experts and the head, a byte a weight and a float32 scale an output row
            (symmetric, round to nearest). "experts_int8": the experts alone so (vLLM's ExpertsInt8). "int4": linear
            layers in groups of up to 128 weights through torchao, experts and head as int8.
    Returns:
        The same model.
    Raises:
        UnknownName: the mode is none.
        UserError: "int4" without torchao, or where torchao cannot run it.

    Example:
        >>> import statespan
        >>> model = statespan.quantize(statespan.build("mamba-130m"))
    """
    if mode not in MODES:
        raise UnknownName("quantization", str(mode), MODES)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
            elif isinstance(child, Linear) and mode != "experts_int8":
                kind = _linear_kind(mode, child, is_head=child is model.lm_head)
                setattr(module, name, kind(child.weight, child.bias))
    if model.config.tie_embeddings and mode != "experts_int8":
        model.lm_head = Int8Linear(model.embedding.weight)
    return model.requires_grad_(False)


def _linear_kind(mode: Quantization, layer: Linear, *, is_head: bool) -> type[Int8Linear] | type[Int4Linear]:
    in_groups = mode == "int4" and not is_head and int4_group_size(layer.in_features) is not None
    return Int4Linear if in_groups else Int8Linear


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` was applied."""
    return bool(quantized_weights(model))


def quantized_weights(model: nn.Module) -> dict[str, str | None]:
    """The names of the quantised matrices, each with that of its scale; None for int4, which carries its own."""
    found: dict[str, str | None] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Int8Experts):
            found |= {f"{prefix}.{half}_proj": f"{prefix}.{half}_scale" for half in ("up", "down")}
        elif isinstance(module, Int8Linear):
            found[f"{prefix}.weight"] = f"{prefix}.scale"
        elif isinstance(module, Int4Linear):
            found[f"{prefix}.weight"] = None
    return found


def weight_bytes(config: ModelConfig, mode: Quantization | None = None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a model's weights in `dtype`, quantised or not; int4 groups as half a byte and 4 bytes a group.

    Example:
        >>> from statespan.models.presets import preset
        >>> weight_bytes(preset("jamba-v0.1"), "experts_int8") / 2**30 < 55
        True
    """
    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
        if mode is not None:
            quantize(model, mode)
    packed = [module for module in model.modules() if isinstance(module, Int4Linear)]
    saved = sum(module.weight.nbytes - module.num_bytes for module in packed)
    return sum(value.nbytes for value in model.state_dict().values()) - saved
