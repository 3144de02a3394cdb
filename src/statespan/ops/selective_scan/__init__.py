"""Mamba-1's selective scan for whole sequences; `statespan.ops.selective_state_update` is its one-token step."""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_dim, check_groups, check_name, check_shape, needs_gradients
from statespan.ops.custom_op import define, gradients
from statespan.ops.dispatch import resolve
from statespan.ops.selective_scan import reference

__all__ = ["selective_scan"]

DISCRETIZATIONS = ("bilinear", "mamba", "zoh")


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_final_state: bool = False,
    discretization: str = "mamba",
    backend: str = "auto",
) -> Any:
    """Selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t   (Mamba, arXiv 2312.00752, Alg. 2).

    Args:
        u: [b t d], float. Input of each channel; t >= 1. Rows may be strided.
        dt: [b t d], float. Step size, before dt_bias and softplus when dt_softplus, else > 0.
        A: [d n], float32, < 0. Decay rate per unit of dt.
        B, C: [b t g n], float. g divides d; the channels of a group share them.
        D: [d], float. Skip from input to output.
        z: [b t d], float. Gate: the output is y * silu(z).
        dt_bias: [d], float. Added to dt.
        initial_state: [b d n], float32. The state before the row's first real token; None for zeros.
        segments: [b t], int. The state restarts from zero where the number changes; negative numbers are padding,
            which leaves the state as it is and whose output is zero.
        return_final_state: also return the state after the row's last real token.
        discretization: "mamba" (exp(dt A), dt B), "zoh" (exp(dt A), (exp(dt A) - 1) / A B) or "bilinear"
            ((1 + dt A / 2) / (1 - dt A / 2), dt / (1 - dt A / 2) B).
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b t d] in u.dtype; with return_final_state also the state [b d n] in float32. Both are differentiable
        with respect to every float input.

    Raises:
        UserError: shapes disagree (both shapes in the message), or the discretization is unknown.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: decays, step sizes and the state are float32 whatever the inputs are (float64 inputs stay float64).

    Example:
        >>> u, B = torch.randn(1, 5, 8), torch.randn(1, 5, 1, 4)
        >>> y, state = selective_scan(u, u, -torch.ones(8, 4), B, B, return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 8, 4]))
    """
    op = "selective_scan"
    check_dim(op, "u", u, "[b t d]")
    check_dim(op, "A", A, "[d n]")
    check_dim(op, "B", B, "[b t g n]")
    batch, length, channels = u.shape
    groups, states = B.shape[2], A.shape[1]
    check_shape(op, "dt", dt, "[b t d]", (batch, length, channels))
    check_shape(op, "A", A, "[d n]", (channels, states))
    check_shape(op, "B", B, "[b t g n]", (batch, length, groups, states))
    check_shape(op, "C", C, "[b t g n]", (batch, length, groups, states))
    check_shape(op, "D", D, "[d]", (channels,))
    check_shape(op, "z", z, "[b t d]", (batch, length, channels))
    check_shape(op, "dt_bias", dt_bias, "[d]", (channels,))
    check_shape(op, "initial_state", initial_state, "[b d n]", (batch, channels, states))
    check_shape(op, "segments", segments, "[b t]", (batch, length))
    check_groups(op, groups, "d", channels)
    check_name("discretization", discretization, DISCRETIZATIONS)
    if length == 0:
        raise UserError(f"{op}: u must have at least one token, got {list(u.shape)}")
    tensors = (u, dt, A, B, C, D, z, dt_bias, initial_state, segments)
    y, final_state, _ = _scan(*tensors, dt_softplus, discretization, backend, needs_gradients(*tensors))
    return (y, final_state) if return_final_state else y


def _resolve(tensors: tuple[Any, ...], backend: str) -> str:
    return resolve("selective_scan", backend, tensors[0].device, tensors[0].dtype, tensors[2].dtype)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, dt_softplus, discretization, backend, keep_starts = arguments
    if _resolve(arguments, backend) == "cpu":
        from statespan.ops.selective_scan import cpu  # loads compiled kernels, so imported when it runs

        return cpu.selective_scan(*tensors, dt_softplus, discretization, keep_starts)
    y, final_state = reference.selective_scan(*tensors, dt_softplus, discretization)
    return y, final_state.clone(), final_state.new_empty(0)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, keep_starts = arguments[0], arguments[2], arguments[-1]
    final_state = u.new_empty((u.shape[0], *A.shape), dtype=torch.promote_types(u.dtype, torch.float32))
    starts = final_state.new_empty(0)
    if keep_starts and _resolve(arguments, arguments[-2]) == "cpu":
        from statespan.ops.selective_scan.cpu import CHUNK

        starts = final_state.new_empty((u.shape[0], -(-u.shape[1] // CHUNK), A.shape[1], A.shape[0]))
    return u.new_empty(u.shape), final_state, starts


def _backward(grad_y: Tensor, grad_final: Tensor, starts: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, dt_softplus, discretization, backend = arguments
    *differentiable, segments = tensors
    if _resolve(arguments, backend) == "cpu":
        from statespan.ops.selective_scan import cpu

        inputs = (*differentiable[:8], segments)
        found = cpu.gradients(grad_y, grad_final, starts, *inputs, dt_softplus, discretization)
    else:
        found = gradients(
            lambda *leaves: reference.selective_scan(*leaves, segments, dt_softplus, discretization),
            differentiable,
            (grad_y, grad_final),
        )
    pairs = zip(found, differentiable, strict=True)
    return [gradient.to(value.dtype) for gradient, value in pairs if value is not None and gradient is not None]


def _fake_backward(grad_y: Tensor, grad_final: Tensor, starts: Tensor, *arguments: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in arguments[:9] if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], *inputs[:10])
    ctx.options = inputs[10:13]


def _autograd(ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    starts, *tensors = ctx.saved_tensors
    found = iter(_scan_backward(grad_y, grad_final, starts, *tensors, *ctx.options))
    return *(None if value is None else next(found) for value in tensors[:9]), *[None] * 5


_ARGUMENTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? segments, bool dt_softplus, str discretization, str backend"
)
_scan = define(
    f"selective_scan({_ARGUMENTS}, bool keep_starts) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_scan_backward = define(
    f"selective_scan_backward(Tensor grad_y, Tensor grad_final_state, Tensor starts, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
