"""RMS normalisation: plain, with the residual sum, and gated by a second tensor."""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_shape
from statespan.ops.custom_op import define, gradients
from statespan.ops.dispatch import resolve
from statespan.ops.rms_norm import reference

__all__ = ["gated_rms_norm", "rms_norm"]

MAX_TRITON_WIDTH = 1 << 16  # channels that are normalised together: what fits the registers of one program


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None, backend: str = "auto") -> Any:
    """Root mean square normalisation: y = x / sqrt(mean(x^2) + eps) * weight   (arXiv 1910.07467, eq. 4).

    Args:
        x: [.. d], float.
        weight: [d], float.
        eps: added to the mean square.
        residual: [.. d], float, normally float32. The sum x + residual is normalised in place of x.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [.. d] in weight's dtype, or in the autocast dtype where autocast is on, so that a matrix product that follows
        casts nothing; with a residual (y, x + residual), the sum in the residual's dtype.

    Raises:
        UserError: shapes or devices disagree (both in the message).
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: the mean square and the division are float32 whatever the inputs are (float64 for float64 inputs).

    Example:
        >>> y, total = rms_norm(torch.randn(2, 8), torch.ones(8), eps=1e-5, residual=torch.randn(2, 8))
    """
    check_shape("rms_norm", "weight", weight, "[d]", (x.shape[-1],))
    check_shape("rms_norm", "residual", residual, "[.. d]", x.shape)
    check_devices("rms_norm", x=x, weight=weight, residual=residual)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if residual is None:
        return _rms_norm(x, weight, eps, dtype, backend)
    return _add_rms_norm(x, residual, weight, eps, dtype, backend)


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Gated RMS normalisation: y = rms_norm(x * silu(z)) * weight   (Mamba-2, arXiv 2405.21060, Fig. 6).

    Args:
        x: [.. d], float.
        z: [.. d], float. Gate.
        weight: [d], float.
        eps: added to the mean square.
        group_size: channels that are normalised together; it divides d. None: all d.
        norm_before_gate: y = rms_norm(x) * weight * silu(z) instead.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [.. d] in x.dtype.

    Raises:
        UserError: shapes or devices disagree (both in the message), or group_size does not divide d.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: everything in float32 whatever the inputs are (float64 for float64 inputs).

    Example:
        >>> y = gated_rms_norm(torch.randn(2, 8), torch.randn(2, 8), torch.ones(8), eps=1e-5, group_size=4)
    """
    channels = x.shape[-1]
    check_shape("gated_rms_norm", "z", z, "[.. d]", x.shape)
    check_shape("gated_rms_norm", "weight", weight, "[d]", (channels,))
    check_devices("gated_rms_norm", x=x, z=z, weight=weight)
    group_size = channels if group_size is None else group_size
    if group_size < 1 or channels % group_size:
        raise UserError(f"gated_rms_norm: group_size {group_size} must divide d = {channels}")
    return _gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate, backend)


def _kernels(
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


def _forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    if kernels := _kernels(backend, x, weight, dtype=dtype, width=x.shape[-1]):
        return kernels.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps, dtype)


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    if kernels := _kernels(backend, x, residual, weight, dtype=dtype, width=x.shape[-1]):
        return kernels.add_rms_norm(x, residual, weight, eps, dtype)
    return reference.add_rms_norm(x, residual, weight, eps, dtype)


def _backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x (to which grad_total, the gradient of x itself, is added) and weight."""
    if kernels := _kernels(backend, x, weight, dtype=grad_y.dtype, width=x.shape[-1]):
        return kernels.rms_norm_backward(grad_y, grad_total, x, weight, eps)
    grad_x, grad_weight = gradients(
        lambda x, weight: (reference.rms_norm(x, weight, eps, grad_y.dtype),), (x, weight), (grad_y,)
    )
    assert grad_x is not None and grad_weight is not None
    return (grad_x if grad_total is None else grad_x + grad_total), grad_weight


def _add_backward(
    grad_y: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual in total's dtype, of x in `dtype` (the same values), and of weight."""
    kernels = _kernels(backend, total, weight, dtype=grad_y.dtype, width=total.shape[-1])
    if kernels is None or not total.is_cuda:
        grad, grad_weight = _backward(grad_y, grad_total, total, weight, eps, backend)
        return grad, grad.to(dtype, copy=True), grad_weight
    rounded = _new(total, dtype)
    grad, grad_weight = kernels.rms_norm_backward(grad_y, grad_total, total, weight, eps, rounded)
    return grad, rounded, grad_weight


def _gated_forward(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool, backend: str
) -> Tensor:
    if kernels := _kernels(backend, x, z, weight, op="gated_rms_norm", width=group_size):
        return kernels.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate)
    return reference.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate)


def _gated_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    if kernels := _kernels(backend, x, z, weight, op="gated_rms_norm", width=group_size):
        return kernels.gated_rms_norm_backward(grad_y, x, z, weight, eps, group_size, norm_before_gate)
    return gradients(  # type: ignore[return-value]  # no input is None, so no gradient is
        lambda x, z, weight: (reference.gated_rms_norm(x, z, weight, eps, group_size, norm_before_gate),),
        (x, z, weight),
        (grad_y,),
    )


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(like.shape, dtype=dtype or like.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_rms_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.eps, ctx.backend), None, None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, ctx.eps, _, ctx.backend = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(output[1], weight)


def _add_autograd(ctx: Any, grad_y: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.dtype == grad_total.dtype:  # one tensor serves both
        grad, grad_weight = _rms_norm_backward(grad_y, grad_total, *ctx.saved_tensors, ctx.eps, ctx.backend)
        return grad, grad, grad_weight, None, None, None
    found = _add_rms_norm_backward(grad_y, grad_total, *ctx.saved_tensors, ctx.eps, ctx.dtype, ctx.backend)
    grad, rounded, grad_weight = found
    return rounded, grad, grad_weight, None, None, None


def _gated_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight)


def _gated_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_rms_norm_backward(grad_y, *ctx.saved_tensors, *ctx.options), None, None, None, None


_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype, str backend) -> Tensor",
    _forward,
    lambda x, weight, eps, dtype, backend: _new(x, dtype),
    setup_context=_setup_context,
    backward=_autograd,
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps, dtype, backend: (_new(x, dtype), _new(residual)),
    setup_context=_add_setup_context,
    backward=_add_autograd,
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    lambda grad_y, grad_total, x, weight, eps, backend: (_new(x), _new(weight)),
)
_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad_y, Tensor grad_total, Tensor total, Tensor weight, float eps, ScalarType dtype,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _add_backward,
    lambda grad_y, grad_total, total, weight, eps, dtype, backend: (_new(total), _new(total, dtype), _new(weight)),
)
_gated_rms_norm = define(
    "gated_rms_norm(Tensor x, Tensor z, Tensor weight, float eps, int group_size, bool norm_before_gate, str backend)"
    " -> Tensor",
    _gated_forward,
    lambda x, *_: _new(x),
    setup_context=_gated_setup_context,
    backward=_gated_autograd,
)
_gated_rms_norm_backward = define(
    "gated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor z, Tensor weight, float eps, int group_size,"
    " bool norm_before_gate, str backend) -> (Tensor, Tensor, Tensor)",
    _gated_backward,
    lambda grad_y, x, z, weight, *_: (_new(x), _new(z), _new(weight)),
)
