"""Mamba-2's state-space dual form, for whole sequences; `statespan.ops.ssd_state_update` is its one-token step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import DISCRETIZATIONS, check_devices, check_dim, check_groups, check_name, check_shape
from statespan.ops.custom_op import define
from statespan.ops.ssd import backends
from statespan.ops.ssd.inputs import Inputs, Options

__all__ = ["ssd"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 256,
    discretization: str = "mamba",
    backend: str = "auto",
) -> Any:
    """State-space dual: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t   (arXiv 2405.21060, §5).

    Args:
        x: [b t h p], float. Input of each head; t >= 1. Rows may be strided.
        dt: [b t h], float. Step size, before dt_bias and softplus when dt_softplus, else > 0.
        A: [h], float32, < 0. Decay rate per unit of dt.
        B, C: [b t g n], float. g divides h; the heads of a group share them.
        D: [h] or [h p], float. Skip from input to output.
        dt_bias: [h], float. Added to dt.
        dt_limit: the range dt is clamped to, after softplus.
        initial_state: [b h p n], float32. The state before the row's first real token; None for zeros.
        segments: [b t], int. The state restarts from zero where the number changes; negative numbers are padding,
            which leaves the state as it is and whose output is zero.
        return_final_state: also return the state after the row's last real token.
        chunk_size: the longest stretch of tokens turned into one matrix; the result does not depend on it, and a
            backend may take shorter ones.
        discretization: "mamba" (exp(dt A), dt B), "zoh" (exp(dt A), (exp(dt A) - 1) / A B) or "bilinear"
            ((1 + dt A / 2) / (1 - dt A / 2), dt / (1 - dt A / 2) B).
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b t h p] in x.dtype; with return_final_state also the state [b h p n] in float32. Both are differentiable
        with respect to every float input. The backward keeps the inputs and nothing else.

    Raises:
        UserError: shapes or devices disagree (both in the message), or the discretization is unknown.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: decays, their sums and the state are float32; matrix products take their factors in x.dtype (float64
    inputs stay float64).

    Example:
        >>> import torch
        >>> x, dt, B = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2), torch.randn(1, 5, 1, 4)
        >>> y, state = ssd(x, dt, -torch.ones(2), B, B, return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 5, 2, 8]), torch.Size([1, 2, 8, 4]))
    """
    check_dim("ssd", "x", x, "[b t h p]")
    check_dim("ssd", "B", B, "[b t g n]")
    batch, length, heads, head_dim = x.shape
    groups, states = B.shape[2:]
    check_shape("ssd", "dt", dt, "[b t h]", (batch, length, heads))
    check_shape("ssd", "A", A, "[h]", (heads,))
    check_shape("ssd", "B", B, "[b t g n]", (batch, length, groups, states))
    check_shape("ssd", "C", C, "[b t g n]", (batch, length, groups, states))
    if D is not None and D.shape != (heads,):
        check_shape("ssd", "D", D, "[h] or [h p]", (heads, head_dim))
    check_shape("ssd", "dt_bias", dt_bias, "[h]", (heads,))
    check_shape("ssd", "initial_state", initial_state, "[b h p n]", (batch, heads, head_dim, states))
    check_shape("ssd", "segments", segments, "[b t]", (batch, length))
    check_groups("ssd", groups, "h", heads)
    check_name("discretization", discretization, DISCRETIZATIONS)
    check_devices(
        "ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state, segments=segments
    )
    if length == 0:
        raise UserError(f"ssd: x must have at least one token, got {list(x.shape)}")
    if chunk_size < 1:
        raise UserError(f"ssd: chunk_size must be at least 1, got {chunk_size}")
    if not dt_limit[0] <= dt_limit[1]:
        raise UserError(f"ssd: dt_limit must rise, got {dt_limit}")
    tensors = (x, dt, A, B.to(x.dtype), C.to(x.dtype), D, dt_bias, initial_state, segments)
    y, final_state = _ssd(*tensors, dt_softplus, *map(float, dt_limit), chunk_size, discretization, backend)
    return (y, final_state) if return_final_state else y


def _named(arguments: Sequence[Any]) -> tuple[Inputs, Options]:
    """The tensors, and the options that follow them."""
    *tensors, dt_softplus, dt_min, dt_max, chunk_size, discretization = arguments
    return Inputs(*tensors), Options(dt_softplus, (dt_min, dt_max), chunk_size, discretization)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend = arguments
    return backends.forward(*_named(given), backend)


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend = arguments
    return backends.fake_forward(_named(given)[0], backend)


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> list[Tensor]:
    *given, backend = arguments
    return backends.backward(grad_y, grad_final_state, *_named(given), backend)


def _fake_backward(grad_y: Tensor, grad_final_state: Tensor, *inputs: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in inputs[:8] if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.options = inputs[9:]


def _autograd(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = iter(_ssd_backward(grad_y, grad_final_state, *tensors, *ctx.options))
    return *(None if value is None else next(found) for value in tensors[:-1]), *[None] * (1 + len(ctx.options))


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? segments, bool dt_softplus, float dt_min, float dt_max, int chunk_size, str discretization, str backend"
)
_ssd = define(
    f"ssd({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward, setup_context=_setup_context, backward=_autograd
)
_ssd_backward = define(
    f"ssd_backward(Tensor grad_y, Tensor grad_final_state, {_ARGUMENTS}) -> Tensor[]", _backward, _fake_backward
)
