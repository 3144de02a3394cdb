"""Mamba-2's state-space dual form, for whole sequences; `statespan.ops.ssd_state_update` is its one-token step."""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import DISCRETIZATIONS, check_devices, check_dim, check_groups, check_name, check_shape
from statespan.ops.custom_op import define, gradients
from statespan.ops.dispatch import resolve
from statespan.ops.ssd import chunked, reference
from statespan.ops.ssd.inputs import Inputs, Options

__all__ = ["ssd"]

MAX_TRITON_STATES = 256


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


def _split(arguments: tuple[Any, ...]) -> tuple[Inputs, Options, str]:
    """The op's arguments as tensors, options and the name of the backend to run."""
    *tensors, dt_softplus, dt_min, dt_max, chunk_size, discretization, backend = arguments
    x = tensors[0]
    if x.device.type == "cpu":
        chunk_size = min(chunk_size, chunked.CPU_CHUNK)
    inputs = Inputs(*tensors)
    too_large = ()
    if inputs.B.shape[3] > MAX_TRITON_STATES:
        too_large = (("triton", f"its kernels hold up to {MAX_TRITON_STATES} states, and B has {inputs.B.shape[3]}"),)
    name = resolve("ssd", backend, x.device, x.dtype, inputs.dt.dtype, too_large=too_large)
    return inputs, Options(dt_softplus, (dt_min, dt_max), chunk_size, discretization), name


def _chunked(name: str) -> Any:
    """The backend of that name that works on chunks; loaded when it runs."""
    if name == "triton":
        from statespan.ops.ssd import triton_backend

        return triton_backend
    return chunked


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options, backend = _split(arguments)
    with torch.autocast(inputs.x.device.type, enabled=False):
        return (reference.ssd if backend == "reference" else _chunked(backend).forward)(inputs, options)


def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    *arguments: Any,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of the inputs that are there, in their order; those of x, dt, B and C in `into`, if it is given."""
    inputs, options, backend = _split(arguments)
    with torch.autocast(inputs.x.device.type, enabled=False):
        if backend == "reference":
            found = gradients(
                lambda *tensors: reference.ssd(Inputs(*tensors, segments=inputs.segments), options),
                inputs.differentiable,
                (grad_y, grad_final_state),
            )
        elif backend == "triton":
            found = _chunked(backend).backward(grad_y, grad_final_state, inputs, options, into)
        else:
            found = _chunked(backend).backward(grad_y, grad_final_state, inputs, options)
    if into is not None:
        for place, gradient in zip(into, (found[0], found[1], found[3], found[4]), strict=True):
            if gradient is not None and gradient is not place:
                place.copy_(gradient)
    return [gradient for gradient in found if gradient is not None]


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, _, _ = _split(arguments)
    batch, _, heads, head_dim = inputs.x.shape
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    state = inputs.x.new_empty((batch, heads, head_dim, inputs.B.shape[3]), dtype=dtype)
    return inputs.x.new_empty(inputs.x.shape), state


def _fake_backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> list[Tensor]:
    inputs, _, _ = _split(arguments)
    return [value.new_empty(value.shape) for value in inputs.differentiable if value is not None]


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
