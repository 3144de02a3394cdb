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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate pairs of the leading dimensions of `x` [b t heads head_dim]: halves, or neighbours if interleaved."""
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1) if rest.shape[-1] else out.to(x.dtype)
