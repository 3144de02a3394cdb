"""RMS normalisation, plain and gated, in PyTorch: the truth the other backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def normalize(x: Tensor, eps: float) -> Tensor:
    """x divided by the root mean square of its last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """y of `statespan.ops.rms_norm` in `dtype`, differentiable by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (normalize(x.to(wide), eps) * weight.to(wide)).to(dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and the sum of `statespan.ops.rms_norm` with a residual."""
    total = (x.to(torch.promote_types(x.dtype, residual.dtype)) + residual).to(residual.dtype)
    return rms_norm(total, weight, eps, dtype), total


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    """y of `statespan.ops.gated_rms_norm`, differentiable by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h, gate = x.to(wide), F.silu(z.to(wide))
    if not norm_before_gate:
        h = h * gate
    h = normalize(h.unflatten(-1, (-1, group_size)), eps).flatten(-2) * weight.to(wide)
    if norm_before_gate:
        h = h * gate
    return h.to(x.dtype)
