"""Causal depthwise 1-D convolution, for whole sequences and for one token."""

from typing import Any

from torch import Tensor

from statespan.ops.arguments import (
    check_devices,
    check_dim,
    check_name,
    check_shape,
    needs_gradients,
    refuse_gradients,
)
from statespan.ops.causal_conv1d import backends, reference
from statespan.ops.custom_op import define
from statespan.ops.dispatch import resolve

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Any:
    """Causal depthwise convolution: y_t = silu(bias + sum_i weight[:, i] x_{t-k+1+i})   (arXiv 2312.00752, Fig. 3).

    Args:
        x: [b t d], float. Rows may be strided.
        weight: [d k], float. weight[:, k-1] meets the current token.
        bias: [d], float.
        activation: "silu" or None.
        initial_state: [b k-1 d], float. The tokens before the row's first real one, oldest first; None for zeros.
        segments: [b t], int. The window restarts from zeros where the number changes; negative numbers are padding,
            which no window holds and whose output is zero.
        return_final_state: also return the newest k-1 real inputs of the last segment, oldest first.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b t d] in x.dtype; with return_final_state also the state [b k-1 d] in x.dtype. Both are differentiable with
        respect to x, weight, bias and initial_state.

    Raises:
        UserError: shapes or devices disagree (both in the message), or the activation is unknown.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: sums and SiLU in float32 (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> y, state = causal_conv1d(torch.randn(1, 5, 8), torch.randn(8, 4), return_final_state=True)
        >>> y.shape, state.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 3, 8]))
    """
    check_dim("causal_conv1d", "x", x, "[b t d]")
    batch, length, channels = x.shape
    silu = _check("causal_conv1d", channels, weight, bias, activation)
    check_devices("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state, segments=segments)
    if initial_state is not None:
        state_shape = (batch, weight.shape[1] - 1, channels)
        check_shape("causal_conv1d", "initial_state", initial_state, "[b k-1 d]", state_shape)
        initial_state = initial_state.to(x.dtype)
    check_shape("causal_conv1d", "segments", segments, "[b t]", (batch, length))
    y, final_state = _causal_conv1d(x, weight, bias, initial_state, segments, silu, backend)
    return (y, final_state) if return_final_state else y


def causal_conv1d_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`.

    Args:
        state: [b k-1 d], float. The tokens before this one, oldest first; left as it is.
        x: [b d], float. Rows may be strided.
        weight, bias, activation, backend: as in `causal_conv1d`.

    Returns:
        y [b d] and the next state [b k-1 d], both in x.dtype. Gradients come from the reference: "auto" takes it where
        autograd records.

    Raises:
        UserError: shapes or devices disagree, the activation is unknown, or backend="cpu" is to be differentiated.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Example:
        >>> import torch
        >>> y, state = causal_conv1d_update(torch.zeros(1, 3, 8), torch.randn(1, 8), torch.randn(8, 4))
    """
    check_dim("causal_conv1d_update", "x", x, "[b d]")
    batch, channels = x.shape
    silu = _check("causal_conv1d_update", channels, weight, bias, activation)
    check_shape("causal_conv1d_update", "state", state, "[b k-1 d]", (batch, weight.shape[1] - 1, channels))
    check_devices("causal_conv1d_update", state=state, x=x, weight=weight, bias=bias)
    if needs_gradients(state, x, weight, bias):
        refuse_gradients("causal_conv1d_update", backend)
        return reference.causal_conv1d_update(state, x, weight, bias, silu)
    return _causal_conv1d_update(state, x, weight, bias, silu, backend)


def _check(op: str, channels: int, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    """Check what both ops share; whether SiLU is applied."""
    check_dim(op, "weight", weight, "[d k]")
    check_shape(op, "weight", weight, "[d k]", (channels, weight.shape[1]))
    check_shape(op, "bias", bias, "[d]", (channels,))
    if activation is not None:
        check_name(f"activation of {op}", activation, ("silu",))
    return activation is not None


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _fake_backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    inputs = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if value is None else value.new_empty(value.shape) for value in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, initial_state, segments, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, segments)


def _autograd(ctx: Any, grad_y: Tensor, grad_final_state: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, segments = ctx.saved_tensors
    found = _causal_conv1d_backward(
        grad_y, grad_final_state, x, weight, bias, initial_state, segments, ctx.silu, ctx.backend
    )
    inputs = (x, weight, bias, initial_state)
    return (
        *(None if value is None else gradient for value, gradient in zip(inputs, found, strict=True)),
        None,
        None,
        None,
    )


def _update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, backend: str
) -> tuple[Tensor, Tensor]:
    match resolve("causal_conv1d_update", backend, x.device, x.dtype, weight.dtype):
        case "cpu":
            from statespan.ops.causal_conv1d import cpu  # loads compiled kernels, so imported when it runs

            return cpu.update(state, x, weight, bias, silu)
        case "triton":
            from statespan.ops.causal_conv1d import triton_backend  # imports Triton, so imported when it runs

            return triton_backend.update(state, x, weight, bias, silu)
        case _:
            return reference.causal_conv1d_update(state, x, weight, bias, silu)


def _fake_update(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(state.shape)


_causal_conv1d = define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? segments, bool silu,"
    " str backend) -> (Tensor, Tensor)",
    backends.forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_causal_conv1d_backward = define(
    "causal_conv1d_backward(Tensor grad_y, Tensor grad_final_state, Tensor x, Tensor weight, Tensor? bias,"
    " Tensor? initial_state, Tensor? segments, bool silu, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    backends.backward,
    _fake_backward,
)
_causal_conv1d_update = define(
    "causal_conv1d_update(Tensor state, Tensor x, Tensor weight, Tensor? bias, bool silu, str backend)"
    " -> (Tensor, Tensor)",
    _update,
    _fake_update,
)
