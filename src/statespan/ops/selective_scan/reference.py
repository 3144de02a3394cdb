"""The selective scan as the recurrence that the Mamba paper writes down, one token after the other."""

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.segments import PADDING, RESTARTS, token_marks
from statespan.ops.selective_scan.inputs import Inputs, Options
from statespan.ops.state_update.reference import discretize, step_size


def selective_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.selective_scan`, differentiable by autograd."""
    u, B, C, D, z, segments = inputs.u, inputs.B, inputs.C, inputs.D, inputs.z, inputs.segments
    dtype = torch.promote_types(u.dtype, torch.float32)
    repeats = u.shape[2] // B.shape[2]  # channels of a group
    A, x = inputs.A.to(dtype), u.to(dtype)
    dt = step_size(inputs.dt.to(dtype), inputs.dt_bias, options.dt_softplus)
    state = inputs.initial_state
    state = x.new_zeros(u.shape[0], *A.shape) if state is None else state.to(dtype)
    marks = None if segments is None else token_marks(segments)[..., None, None]  # [b t 1 1]
    outputs: list[Tensor] = []
    for t in range(u.shape[1]):
        Abar, scale = discretize(dt[:, t, :, None], A, options.discretization)
        Bt, Ct = (matrix[:, t].to(dtype).repeat_interleave(repeats, dim=1) for matrix in (B, C))  # [b d n]
        before = state if marks is None else torch.where(marks[:, t] == RESTARTS, 0.0, state)
        after = Abar * before + scale * Bt * x[:, t, :, None]
        state = after if marks is None else torch.where(marks[:, t] == PADDING, state, after)
        outputs.append((Ct * state).sum(-1))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    if marks is not None:
        y = torch.where(marks[..., 0] == PADDING, 0.0, y)
    return y.to(u.dtype), state
