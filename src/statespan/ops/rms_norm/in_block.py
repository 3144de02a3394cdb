"""RMS normalisation where a mixer's half of a block is one op: what its backward needs, in passes made anyway.

In bfloat16 the norm's output y = x / rms(x) * weight, which a product reads, is kept with 1 / rms(x) in place of x, of
twice the size: x / rms(x) is y / weight. (float16 lacks the range for small weights.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from statespan.ops.rms_norm import backends

TINY = 1e-30  # in place of a weight of 0, so that x / rms(x) comes back


def keeps_output(dtype: torch.dtype) -> bool:
    """Whether a norm whose output has this dtype is kept by its output."""
    return dtype == torch.bfloat16


def new_inverses(hidden: Tensor) -> Tensor:
    """Room for 1 / rms of each row."""
    return hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)


class Normed(NamedTuple):
    """The norm's output y [.. d], the sum x [.. d] that it normalised, if there was one, and 1 / rms(x) [..]."""

    y: Tensor
    total: Tensor | None
    inverses: Tensor | None


def forward(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> Normed:
    """The norm of hidden, or hidden + update; with `keep` and in bfloat16 with what replaces its input."""
    inverses = None
    if not (keep and keeps_output(dtype)):
        y, total = _forward_of(hidden, update, weight, eps, dtype)
    elif kernels := _gpu_kernels(hidden, weight, dtype):
        inverses = new_inverses(hidden)
        if update is None:
            y, total = kernels.rms_norm(hidden, weight, eps, dtype, inverses), None
        else:
            y, total = kernels.add_rms_norm(update, hidden, weight, eps, dtype, inverses)
    else:
        y, total = _forward_of(hidden, update, _divisor(weight), eps, dtype)
        x = (hidden if total is None else total).float()
        inverses = torch.rsqrt(x.square().mean(-1) + eps)
    return Normed(y, total, inverses)


def backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    kept: Tensor,
    inverses: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    update_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of hidden in `dtype` and of update in `update_dtype` (None: there is but one), y, weight's gradient.

    `kept` is the norm's output, or without `inverses` its input.
    """
    if kernels := _gpu_kernels(kept, weight, grad_y.dtype):
        rounded = None if update_dtype is None else backends.new_like(kept, update_dtype)
        y = backends.new_like(kept, grad_y.dtype) if inverses is None else None
        given = (kept, weight, eps, rounded, y, inverses, dtype)
        grad, grad_weight = kernels.rms_norm_backward(grad_y, grad_total, *given)
        return grad, rounded, kept if y is None else y, grad_weight
    if inverses is None:
        grad, grad_weight = backends.backward(grad_y, grad_total, kept, weight, eps, "auto")
        y = backends.forward(kept, weight, eps, grad_y.dtype, "auto")
    else:
        divisor, y = _divisor(weight).float(), kept
        normal, grad = kept.float() / divisor, grad_y.float()
        grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * divisor
        grad = (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverses.unsqueeze(-1)
        grad = (grad if grad_total is None else grad + grad_total).to(dtype)
    return grad, None if update_dtype is None else grad.to(update_dtype), y, grad_weight


def gated_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    into_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated norm's output once more, and the gradients of x and weight; that of z is written to `into_z`."""
    options = (eps, group_size, norm_before_gate)
    kernels = backends.kernels_of("auto", x, z, weight, op="gated_rms_norm", width=group_size)
    if kernels is None or not x.is_cuda:
        y = backends.gated_forward(x, z, weight, *options, "auto")
        grad_x, grad_z, grad_weight = backends.gated_backward(grad_y, x, z, weight, *options, "auto")
        into_z.copy_(grad_z)
        return y, grad_x, grad_weight
    y = backends.new_like(x)
    grad_x, _, grad_weight = kernels.gated_rms_norm_backward(grad_y, x, z, weight, *options, into_z, y)
    return y, grad_x, grad_weight


def _gpu_kernels(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Any:
    return backends.kernels_of("auto", x, weight, dtype=dtype, width=x.shape[-1]) if x.is_cuda else None


def _forward_of(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if update is None:
        return backends.forward(hidden, weight, eps, dtype, "auto"), None
    return backends.add_forward(update, hidden, weight, eps, dtype, "auto")


def _divisor(weight: Tensor) -> Tensor:
    return torch.where(weight == 0, TINY, weight)
