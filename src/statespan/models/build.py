"""Build a model with fresh weights from a preset's name or a config."""

import torch

from statespan.errors import UserError
from statespan.machine import usable_device
from statespan.models.config import ModelConfig
from statespan.models.initialization import initialize
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset


def build(
    preset_or_config: str | ModelConfig,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    draw_on_device: bool = False,
) -> LanguageModel:
    """A model with fresh weights, initialised as models/initialization.py says.

    Args:
        preset_or_config: a name of `statespan.presets()`, or a ModelConfig.
        seed: of the weights; the same seed gives the same weights on every device.
        device: where the weights lie; "meta" gives shapes without memory.
        dtype: of the weights; A_log, D and dt_bias stay float32.
        draw_on_device: draw the weights where they lie: quick for billions of them on a GPU, but other values there
            than on the CPU.
    Returns:
        The model, in training mode.
    Raises:
        UnknownName: no preset has that name; the message offers the nearest.
        UserError: there is no such device here.

    Example:
        >>> import statespan
        >>> sum(p.numel() for p in statespan.build("mamba-130m", device="meta").parameters())
        129135360
    """
    config = preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    if not isinstance(config, ModelConfig):
        raise UserError(f"build takes a preset's name or a ModelConfig, got {type(preset_or_config).__name__}")
    model = empty_model(config, device=device, dtype=dtype)
    if model.device.type != "meta":
        initialize(model, config, seed, model.device if draw_on_device else "cpu")
    return model


def empty_model(config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
    """A model whose weights are allocated and not filled."""
    device = usable_device(device)
    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    return model if device.type == "meta" else model.to_empty(device=device)
