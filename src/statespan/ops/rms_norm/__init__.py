"""RMS normalisation: plain, with the residual sum, and gated by a second tensor."""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_shape
from statespan.ops.custom_op import define
from statespan.ops.rms_norm import backends

__all__ = ["gated_rms_norm", "rms_norm"]


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
    backends.forward,
    lambda x, weight, eps, dtype, backend: backends.new_like(x, dtype),
    setup_context=_setup_context,
    backward=_autograd,
)
_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype, str backend)"
    " -> (Tensor, Tensor)",
    backends.add_forward,
    lambda x, residual, weight, eps, dtype, backend: (backends.new_like(x, dtype), backends.new_like(residual)),
    setup_context=_add_setup_context,
    backward=_add_autograd,
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad_y, Tensor? grad_total, Tensor x, Tensor weight, float eps, str backend)"
    " -> (Tensor, Tensor)",
    backends.backward,
    lambda grad_y, grad_total, x, weight, eps, backend: (backends.new_like(x), backends.new_like(weight)),
)
_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad_y, Tensor grad_total, Tensor total, Tensor weight, float eps, ScalarType dtype,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    backends.add_backward,
    lambda grad_y, grad_total, total, weight, eps, dtype, backend: (
        backends.new_like(total),
        backends.new_like(total, dtype),
        backends.new_like(weight),
    ),
)
_gated_rms_norm = define(
    "gated_rms_norm(Tensor x, Tensor z, Tensor weight, float eps, int group_size, bool norm_before_gate, str backend)"
    " -> Tensor",
    backends.gated_forward,
    lambda x, *_: backends.new_like(x),
    setup_context=_gated_setup_context,
    backward=_gated_autograd,
)
_gated_rms_norm_backward = define(
    "gated_rms_norm_backward(Tensor grad_y, Tensor x, Tensor z, Tensor weight, float eps, int group_size,"
    " bool norm_before_gate, str backend) -> (Tensor, Tensor, Tensor)",
    backends.gated_backward,
    lambda grad_y, x, z, weight, *_: (backends.new_like(x), backends.new_like(z), backends.new_like(weight)),
)
