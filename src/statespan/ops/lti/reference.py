"""The recurrence of a linear time-invariant system as a loop over tokens: the truth for the other two views."""

import torch
from torch import Tensor

from statespan.ops.lti.dplr import DplrSystem
from statespan.ops.lti.system import System
from statespan.ops.segments import PADDING, RESTARTS, token_marks


def lti_scan(
    u: Tensor,
    system: System | DplrSystem,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_k = C x_k + D u_k with x_k = A x_{k-1} + B u_k, for u [b t d]; also the last state [b d n]."""
    shape = (u.shape[0], *system.B.shape)
    state = torch.zeros(shape, dtype=system.B.dtype, device=u.device) if initial_state is None else initial_state
    marks = None if segments is None else token_marks(segments)
    out: list[Tensor] = []
    for k, token in enumerate(u.unbind(1)):
        mark = None if marks is None else marks[:, k].view(-1, 1, 1)
        before = state if mark is None else torch.where(mark == RESTARTS, 0, state)
        y, state = system.step(before, token)
        y = y if D is None else y + D * token
        if mark is not None:
            y, state = torch.where(mark.squeeze(-1) == PADDING, 0, y), torch.where(mark == PADDING, before, state)
        out.append(y)
    return torch.stack(out, dim=1), state
