"""Values and gradients of the norms by the backend that runs: what blocks call, being kernels themselves."""

from typing import Any

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients
from statespan.ops.dispatch import resolve
from statespan.ops.rms_norm import reference

MAX_TRITON_WIDTH = 1 << 16  # channels that are normalised together: what fits the registers of one program


def kernels_of(
    backend: str, *tensors: Tensor, op: str = "rms_norm", dtype: torch.dtype = torch.float32, width: int = 1
) -> Any:
    """The module of the kernels, or None where the reference runs; `width` channels are normalised together."""
    too_large = ()
    if width > MAX_TRITON_WIDTH:
        too_large = (("triton", f"a program holds a row of up to {MAX_TRITON_WIDTH} channels, not {width}"),)
    dtypes = (dtype, *(tensor.dtype for tensor in tensors))
    match resolve(op, backend, tensors[0].device, *dtypes, too_large=too_large):
        case "cpu":
            from statespan.ops.rms_norm import cpu  # loads compiled kernels, so imported when it runs

            return cpu
        case "triton":
            from statespan.ops.rms_norm import triton_backend  # imports Triton, so imported when it runs

            return triton_backend
        case _:
            return None


def forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    """y of `statespan.ops.rms_norm` in `dtype`."""
    if kernels := kernels_of(backend, x, weight, dtype=dtype, width=x.shape[-1]):
        return kernels.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps, dtype)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """y of x + residual in `dtype`, and the sum."""
    if kernels := kernels_of(backend, x, residual, weight, dtype=dtype, width=x.shape[-1]):
        return kernels.add_rms_norm(x, residual, weight, eps, dtype)
    return reference.add_rms_norm(x, residual, weight, eps, dtype)


def backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x (to which grad_total, the gradient of x itself, is added) and weight."""
    if kernels := kernels_of(backend, x, weight, dtype=grad_y.dtype, width=x.shape[-1]):
        return kernels.rms_norm_backward(grad_y, grad_total, x, weight, eps)
    grad_x, grad_weight = gradients(
        lambda x, weight: (reference.rms_norm(x, weight, eps, grad_y.dtype),), (x, weight), (grad_y,)
    )
    assert grad_x is not None and grad_weight is not None
    return (grad_x if grad_total is None else grad_x + grad_total), grad_weight


def add_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual in total's dtype, of x in `dtype` (the same values), and of weight."""
    kernels = kernels_of(backend, total, weight, dtype=grad_y.dtype, width=total.shape[-1])
    if kernels is None or not total.is_cuda:
        grad, grad_weight = backward(grad_y, grad_total, total, weight, eps, backend)
        return grad, grad.to(dtype, copy=True), grad_weight
    rounded = new_like(total, dtype)
    grad, grad_weight = kernels.rms_norm_backward(grad_y, grad_total, total, weight, eps, rounded)
    return grad, rounded, grad_weight


def gated_forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool, backend: str
) -> Tensor:
    """y of `statespan.ops.gated_rms_norm`."""
    if kernels := kernels_of(backend, x, z, weight, op="gated_rms_norm", width=group_size):
        return kernels.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate)
    return reference.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate)


def gated_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, z and weight."""
    if kernels := kernels_of(backend, x, z, weight, op="gated_rms_norm", width=group_size):
        return kernels.gated_rms_norm_backward(grad_y, x, z, weight, eps, group_size, norm_before_gate)
    return gradients(  # type: ignore[return-value]  # no input is None, so no gradient is
        lambda x, z, weight: (reference.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate),),
        (x, z, weight),
        (grad_y,),
    )


def new_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of the same shape, in `dtype` or its own."""
    return like.new_empty(like.shape, dtype=dtype or like.dtype)
