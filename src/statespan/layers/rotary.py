"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import math

import torch
from torch import Tensor

from statespan.layers.config import AttentionConfig, RopeScaling


def rotary_angles(position: Tensor, config: AttentionConfig, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [.. 1 rotary_dim/2] in float32 for `position` [..]: angle = position * theta^(-2i / rotary_dim)."""
    rotary_dim = config.rotary_dim or head_dim
    pair = torch.arange(0, rotary_dim, 2, device=position.device, dtype=torch.float32)
    assert config.rope_theta is not None  # the caller asks only where positions are configured
    frequency = config.rope_theta ** (-pair / rotary_dim)
    if config.rope_scaling is not None:
        frequency = scaled(frequency, config.rope_scaling)
    angle = position.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def scaled(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies [f] of Llama 3.1: long waves are divided by the factor, short ones kept, between them a blend."""
    waves = scaling.original_context * frequency / (2 * math.pi)  # that fit in the original context
    kept = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequency / scaling.factor, frequency, kept.clamp(0, 1))
