"""One step of the Mamba-1 and Mamba-2 recurrences in PyTorch: the truth the other backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def discretize(dt: Tensor, A: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Abar and the factor that turns B into Bbar, for dt and A that broadcast."""
    step = dt * A
    if discretization == "mamba":
        return torch.exp(step), dt.expand_as(step)
    if discretization == "zoh":
        # The limit at A = 0 is dt: a series near it. Each branch must have finite slopes where the other rules.
        near = step.abs() < 0.1
        far = torch.expm1(step) / torch.where(near, 1.0, A)
        return torch.exp(step), torch.where(near, dt * _expm1_over(torch.where(near, step, 0.0)), far)
    return (1 + step / 2) / (1 - step / 2), dt / (1 - step / 2)


def _expm1_over(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x for |x| <= 0.1, right to the last bit of float64."""
    series = torch.ones_like(x)
    for k in range(10, 1, -1):
        series = 1 + x / k * series
    return series


def step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float] | None = None
) -> Tensor:
    """dt as the recurrence uses it: bias, softplus, limits."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    return dt if dt_limit is None else dt.clamp(*dt_limit)


def selective_state_update(
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
) -> tuple[Tensor, Tensor]:
    """y and the next state of `statespan.ops.selective_state_update`, differentiable by autograd."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, state.dtype), torch.float32)
    channels = u.shape[1] // B.shape[1]  # of a group
    u_ = u.to(dtype)
    dt = step_size(dt.to(dtype), dt_bias, dt_softplus)
    B, C = (value.to(dtype).repeat_interleave(channels, dim=1) for value in (B, C))  # [b d n]
    Abar, scale = discretize(dt[..., None], A.to(dtype), discretization)
    state = Abar * state.to(dtype) + scale * B * u_[..., None]
    y = (C * state).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * u_
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    discretization: str,
) -> tuple[Tensor, Tensor]:
    """y and the next state of `statespan.ops.ssd_state_update`, differentiable by autograd."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
    heads = x.shape[1] // B.shape[1]  # of a group
    x_ = x.to(dtype)
    dt = step_size(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    B, C = (value.to(dtype).repeat_interleave(heads, dim=1) for value in (B, C))  # [b h n]
    Abar, scale = discretize(dt, A.to(dtype), discretization)  # [b h]
    state = Abar[..., None, None] * state.to(dtype) + (scale[..., None] * x_)[..., None] * B[:, :, None, :]
    y = (state * C[:, :, None, :]).sum(-1)
    if D is not None:
        y = y + (D.to(dtype)[:, None] if D.dim() == 1 else D.to(dtype)) * x_
    return y.to(x.dtype), state
