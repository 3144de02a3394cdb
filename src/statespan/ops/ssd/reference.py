"""The state-space dual recurrence, one token after the other: the truth the other backends are held to."""

import torch
from torch import Tensor

from statespan.ops.ssd.inputs import Inputs, Options
from statespan.ops.state_update.reference import discretize, step_size


def ssd(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.ssd`, differentiable by autograd; O(t) Python steps."""
    batch, length, heads, head_dim = inputs.x.shape
    dtype = inputs.sum_dtype
    x = inputs.x.to(dtype)
    each = heads // inputs.B.shape[2]  # heads of a group
    B, C = (value.to(dtype).repeat_interleave(each, dim=2) for value in (inputs.B, inputs.C))  # [b t h n]
    dt = step_size(inputs.dt.to(dtype), inputs.dt_bias, options.dt_softplus, options.dt_limit)
    Abar, scale = discretize(dt, inputs.A.to(dtype), options.discretization)  # [b t h]
    if inputs.initial_state is None:
        state = x.new_zeros(batch, heads, head_dim, B.shape[3])
    else:
        state = inputs.initial_state.to(dtype)
    segments = inputs.segments
    if segments is None:
        segments = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
    current = torch.full_like(segments[:, 0], -1, dtype=torch.int64)  # [b]; -1: no real token was seen yet
    outputs = []
    for t in range(length):
        segment = segments[:, t]
        real = segment >= 0
        restarts = real & (current >= 0) & (segment != current)
        current = torch.where(real, segment, current)

        state = state.masked_fill(restarts[:, None, None, None], 0.0)
        entering = (scale[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]  # [b h p n]
        state = torch.where(real[:, None, None, None], Abar[:, t, :, None, None] * state + entering, state)
        y = (state * C[:, t, :, None, :]).sum(-1)
        if inputs.D is not None:
            y = y + inputs.D.to(dtype).view(heads, -1) * x[:, t]
        outputs.append(y.masked_fill(~real[:, None, None], 0.0))
    return torch.stack(outputs, dim=1).to(inputs.x.dtype), state
