"""The selective scan of Mamba-1."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from statespan.ops.arguments import (
    DISCRETIZATIONS,
    check_devices,
    check_dim,
    check_groups,
    check_name,
    check_shape,
    check_steps,
    needs_gradients,
)
from statespan.ops.custom_op import define
from statespan.ops.selective_scan import backends
from statespan.ops.selective_scan.inputs import Inputs, Options

__all__ = ["selective_scan"]


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
    """Selective state-space scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = (C_t . h_t + D u_t) silu(z_t).

    Mamba, arXiv 2312.00752, Algorithm 2 with the gate of Figure 3.

    Args:
        u: [b t d], float. Input of each channel. Rows of u, dt, z, B and C may be strided.
        dt: [b t d], float. Step size, before dt_bias and softplus when dt_softplus, else > 0.
        A: [d n], float32, < 0. Decay rate per unit of dt.
        B, C: [b t g n], float. g divides d; the d / g channels of a group share them.
        D: [d], float. Skip from input to output.
        z: [b t d], float. Gate.
        dt_bias: [d], float. Added to dt.
        initial_state: [b d n], float32. h before the row's first real token; None for zeros.
        segments: [b t], int. The state restarts from zero where the number changes; tokens with a negative number are
            padding: they leave the state as it is, and their output is zero.
        return_final_state: also return h after the row's last real token.
        discretization: how dt and A become Abar and Bbar. "mamba": exp(dt A) and dt B, what all checkpoints use;
            "zoh": exp(dt A) and (exp(dt A) - 1) / A B; "bilinear": (1 + dt A / 2) / (1 - dt A / 2) and
            dt / (1 - dt A / 2) B.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b t d] in u.dtype; with return_final_state also the last state [b d n] in float32. Both are differentiable
        with respect to every float argument; gradients are the same bits in every run with as many threads.

    Raises:
        UserError: shapes or devices disagree (both in the message), or there is no time step.
        UnknownName: an unknown discretization or backend.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: dt, decays, sums and the state in float32 whatever the inputs are (float64 for float64 inputs). For the
        backward the cpu and triton backends keep the inputs and the state before every 32nd step (cuda: every 64th),
        nothing of size [b t d n].

    Example:
        >>> import torch
        >>> u, dt, A = torch.randn(1, 5, 8), torch.randn(1, 5, 8), -torch.rand(8, 4)
        >>> B, C = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 4)
        >>> y, state = selective_scan(u, dt, A, B, C, return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 8, 4]))
    """
    op = "selective_scan"
    check_dim(op, "u", u, "[b t d]")
    check_dim(op, "A", A, "[d n]")
    check_dim(op, "B", B, "[b t g n]")
    (batch, length, channels), states, groups = u.shape, A.shape[1], B.shape[2]
    check_steps(op, "u", u, "[b t d]")
    check_groups(op, groups, "d", channels)
    check_shape(op, "dt", dt, "[b t d]", (batch, length, channels))
    check_shape(op, "A", A, "[d n]", (channels, states))
    check_shape(op, "B", B, "[b t g n]", (batch, length, groups, states))
    check_shape(op, "C", C, "[b t g n]", (batch, length, groups, states))
    check_shape(op, "D", D, "[d]", (channels,))
    check_shape(op, "z", z, "[b t d]", (batch, length, channels))
    check_shape(op, "dt_bias", dt_bias, "[d]", (channels,))
    check_shape(op, "initial_state", initial_state, "[b d n]", (batch, channels, states))
    check_shape(op, "segments", segments, "[b t]", (batch, length))
    check_name("discretization", discretization, DISCRETIZATIONS)
    check_devices(
        op, u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state, segments=segments
    )
    keep_starts = needs_gradients(u, dt, A, B, C, D, z, dt_bias, initial_state)
    y, final_state, _ = _selective_scan(
        u, dt, A, B, C, D, z, dt_bias, initial_state, segments, dt_softplus, discretization, keep_starts, backend
    )
    return (y, final_state) if return_final_state else y


def _named(arguments: Sequence[Any]) -> tuple[Inputs, Options]:
    """The tensors, and the options that follow them."""
    *tensors, dt_softplus, discretization = arguments
    return Inputs(*tensors), Options(dt_softplus, discretization)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, keep_starts, backend = arguments
    return backends.forward(*_named(given), keep_starts, backend)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, keep_starts, backend = arguments
    return backends.fake_forward(_named(given)[0], keep_starts, backend)


def _backward(grad_y: Tensor | None, grad_final: Tensor | None, starts: Tensor, *arguments: Any) -> list[Tensor]:
    *given, backend = arguments
    return backends.backward(grad_y, grad_final, starts, *_named(given), backend)


def _fake_backward(grad_y: Any, grad_final: Any, starts: Tensor, *inputs: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in inputs[:9] if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.dt_softplus, ctx.discretization, _, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    starts, *inputs = ctx.saved_tensors
    found = iter(
        _selective_scan_backward(grad_y, grad_final, starts, *inputs, ctx.dt_softplus, ctx.discretization, ctx.backend)
    )
    return (*(None if value is None else next(found) for value in inputs[:9]), None, None, None, None, None)


_INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? segments, bool dt_softplus, str discretization"
)
_selective_scan = define(
    f"selective_scan({_INPUTS}, bool keep_starts, str backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_selective_scan_backward = define(
    f"selective_scan_backward(Tensor? grad_y, Tensor? grad_final, Tensor starts, {_INPUTS}, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)
