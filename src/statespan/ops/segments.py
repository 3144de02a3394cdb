"""What the segment number of each token means for ops that mix tokens."""

from typing import overload

import torch
from torch import Tensor

from statespan.ops.dispatch import BACKENDS
from statespan.ops.gpu import GRID_ROWS
from statespan.ops.layout import contiguous

CONTINUES, RESTARTS, PADDING = 0, 1, 2


def token_marks(segments: Tensor) -> Tensor:
    """[b t] int8: PADDING where the number is negative, RESTARTS where it differs from the last real token's.

    A row's first real token continues what came in as its initial state; padding before or between tokens changes
    nothing.
    """
    real = segments >= 0
    index = torch.arange(segments.shape[1], device=segments.device)
    last_real = torch.where(real, index, -1).cummax(dim=1).values
    previous = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    changes = segments.gather(1, previous.clamp(min=0)) != segments
    return torch.where(real, (changes & (previous >= 0)).to(torch.int8) * RESTARTS, PADDING).to(torch.int8)


def kernel_marks(segments: Tensor) -> Tensor:
    """As `token_marks`, which takes 14 launches on a GPU, by one kernel where there is one; not for what is traced."""
    if segments.is_cuda and BACKENDS["cuda"].why_not(segments.device, ()) is None:
        from statespan.ops.cuda_kernels import marks  # compiles for a GPU, so imported when it runs

        if len(segments) <= GRID_ROWS:
            return marks.token_marks(signed_numbers(segments))
    return token_marks(segments)


@overload
def signed_numbers(segments: Tensor) -> Tensor: ...
@overload
def signed_numbers(segments: Tensor | None) -> Tensor | None: ...
def signed_numbers(segments: Tensor | None) -> Tensor | None:
    """The numbers without gaps, in 32 or 64 bits: kernels put -1 where there is no token."""
    if segments is None or segments.dtype == torch.int32:
        return contiguous(segments)
    return segments.to(torch.int64).contiguous()


def run_numbers(segments: Tensor) -> Tensor:
    """[b t] int64: how many restarts there were up to each token; real tokens of one number see each other.

    Run 0 is the one that the initial state enters. Padding has the number of the last real token before it.
    """
    return (token_marks(segments) == RESTARTS).cumsum(dim=1)
