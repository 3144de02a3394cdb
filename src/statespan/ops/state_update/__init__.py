"""One token of the Mamba-1 and Mamba-2 recurrences: what a generated token costs."""

from typing import Any

from torch import Tensor

from statespan.ops.arguments import (
    DISCRETIZATIONS,
    check_devices,
    check_dim,
    check_groups,
    check_name,
    check_shape,
    needs_gradients,
    refuse_gradients,
)
from statespan.ops.custom_op import define
from statespan.ops.dispatch import resolve
from statespan.ops.state_update import reference

__all__ = ["selective_state_update", "ssd_state_update"]


def selective_state_update(
    state: Tensor,
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
    discretization: str = "mamba",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: h' = exp(dt A) h + dt B u,  y = (C . h' + D u) silu(z)   (arXiv 2312.00752).

    Args:
        state: [b d n], float32. h before the token; left as it is.
        u: [b d], float. Input of each channel.
        dt: [b d], float. Step size, before dt_bias and softplus when dt_softplus, else > 0.
        A: [d n], float32, < 0. Decay rate per unit of dt.
        B, C: [b g n], float. g divides d; the channels of a group share them.
        D: [d], float. Skip from input to output.
        z: [b d], float. Gate.
        dt_bias: [d], float. Added to dt.
        discretization: "mamba", "zoh" or "bilinear", as in `selective_scan`.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b d] in u.dtype and the next state [b d n] in float32. Gradients come from the reference: "auto" takes it
        where autograd records.

    Raises:
        UserError: shapes or devices disagree (both in the message), or backend="cpu" is to be differentiated.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: everything in float32 whatever the inputs are (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> state = torch.zeros(1, 8, 4)
        >>> u, dt, B = torch.randn(1, 8), torch.randn(1, 8), torch.randn(1, 1, 4)
        >>> y, state = selective_state_update(state, u, dt, -torch.ones(8, 4), B, B)
    """
    op = "selective_state_update"
    check_dim(op, "state", state, "[b d n]")
    check_dim(op, "B", B, "[b g n]")
    batch, channels, states = state.shape
    groups = B.shape[1]
    check_shape(op, "u", u, "[b d]", (batch, channels))
    check_shape(op, "dt", dt, "[b d]", (batch, channels))
    check_shape(op, "A", A, "[d n]", (channels, states))
    check_shape(op, "B", B, "[b g n]", (batch, groups, states))
    check_shape(op, "C", C, "[b g n]", (batch, groups, states))
    check_shape(op, "D", D, "[d]", (channels,))
    check_shape(op, "z", z, "[b d]", (batch, channels))
    check_shape(op, "dt_bias", dt_bias, "[d]", (channels,))
    check_groups(op, groups, "d", channels)
    check_name("discretization", discretization, DISCRETIZATIONS)
    check_devices(op, state=state, u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if needs_gradients(state, u, dt, A, B, C, D, z, dt_bias):
        refuse_gradients(op, backend)
        return reference.selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, discretization)
    return _selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, discretization, backend)


def ssd_state_update(
    state: Tensor,
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
    discretization: str = "mamba",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `ssd`: h' = exp(dt A) h + dt x B^T,  y = h' C + D x   (Mamba-2, arXiv 2405.21060, eq. 16).

    Args:
        state: [b h p n], float32. The heads' states before the token; left as it is.
        x: [b h p], float. Input of each head.
        dt: [b h], float. Step size, before dt_bias and softplus when dt_softplus, else > 0.
        A: [h], float32, < 0. Decay rate per unit of dt.
        B, C: [b g n], float. g divides h; the heads of a group share them.
        D: [h] or [h p], float. Skip from input to output.
        dt_bias: [h], float. Added to dt.
        dt_limit: the range dt is clamped to, after softplus.
        discretization: "mamba", "zoh" or "bilinear", as in `ssd`.
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        y [b h p] in x.dtype and the next state [b h p n] in float32. Gradients come from the reference: "auto" takes it
        where autograd records.

    Raises:
        UserError: shapes or devices disagree (both in the message), or backend="cpu" is to be differentiated.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: everything in float32 whatever the inputs are (float64 for float64 inputs).

    Example:
        >>> import torch
        >>> state = torch.zeros(1, 2, 8, 4)
        >>> x, dt, B = torch.randn(1, 2, 8), torch.randn(1, 2), torch.randn(1, 1, 4)
        >>> y, state = ssd_state_update(state, x, dt, -torch.ones(2), B, B)
    """
    op = "ssd_state_update"
    check_dim(op, "state", state, "[b h p n]")
    check_dim(op, "B", B, "[b g n]")
    batch, heads, head_dim, states = state.shape
    groups = B.shape[1]
    check_shape(op, "x", x, "[b h p]", (batch, heads, head_dim))
    check_shape(op, "dt", dt, "[b h]", (batch, heads))
    check_shape(op, "A", A, "[h]", (heads,))
    check_shape(op, "B", B, "[b g n]", (batch, groups, states))
    check_shape(op, "C", C, "[b g n]", (batch, groups, states))
    if D is not None and D.shape != (heads,):
        check_shape(op, "D", D, "[h] or [h p]", (heads, head_dim))
    check_shape(op, "dt_bias", dt_bias, "[h]", (heads,))
    check_groups(op, groups, "h", heads)
    check_name("discretization", discretization, DISCRETIZATIONS)
    check_devices(op, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    if needs_gradients(state, x, dt, A, B, C, D, dt_bias):
        refuse_gradients(op, backend)
        return reference.ssd_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, discretization)
    low, high = map(float, dt_limit)
    return _ssd_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, low, high, discretization, backend)


def _module(backend: str) -> Any:
    """Where a backend's two updates are; all take the same arguments."""
    match backend:
        case "cpu":
            from statespan.ops.state_update import cpu  # loads compiled kernels, so imported when it runs

            return cpu
        case "triton":
            from statespan.ops.state_update import triton_backend  # imports Triton, so imported when it runs

            return triton_backend
        case _:
            return reference


def _limits(state: Tensor) -> tuple[tuple[str, str], ...]:
    """The backends that cannot take these sizes, and why."""
    return (("triton", "its kernels want one state at least"),) if state.shape[-1] == 0 else ()


def _selective_kernel(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtypes = (u.dtype, dt.dtype, B.dtype, C.dtype, state.dtype, u.dtype if z is None else z.dtype)
    module = _module(resolve("selective_state_update", backend, u.device, *dtypes, too_large=_limits(state)))
    return module.selective_state_update(state, u, dt, A, B, C, D, z, dt_bias, dt_softplus, discretization)


def _ssd_kernel(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    dtypes = (x.dtype, dt.dtype, B.dtype, C.dtype, state.dtype)
    module = _module(resolve("ssd_state_update", backend, x.device, *dtypes, too_large=_limits(state)))
    return module.ssd_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, (dt_min, dt_max), discretization)


def _fake(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)


_selective_state_update = define(
    "selective_state_update(Tensor state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, bool dt_softplus, str discretization, str backend) -> (Tensor, Tensor)",
    _selective_kernel,
    _fake,
)
_ssd_state_update = define(
    "ssd_state_update(Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias,"
    " bool dt_softplus, float dt_min, float dt_max, str discretization, str backend) -> (Tensor, Tensor)",
    _ssd_kernel,
    _fake,
)
