"""Tokens' marks on NVIDIA GPUs: segments to the kernel of `token_marks.cu`."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from statespan.ops.cuda_kernels.launcher import Kernel, Launch, address

WARPS = 4  # of a block
SEGMENT = {torch.int32: "int", torch.int64: "i64"}

KERNEL = Kernel(Path(__file__).with_name("token_marks.cu"), "token_marks")


def macros(dtype: torch.dtype) -> tuple[tuple[str, str | int], ...]:
    """Those of `token_marks.cu` for numbers of that dtype."""
    return ("SEGMENT", SEGMENT[dtype]), ("WARPS", WARPS)


@lru_cache(maxsize=1024)
def _launch(device: torch.device, rows: int, length: int, dtype: torch.dtype) -> Launch:
    return KERNEL.launch(device, (-(-length // (32 * WARPS)), rows, 1), 32 * WARPS, macros(dtype))


def token_marks(segments: Tensor) -> Tensor:
    """[b t] int8 of `statespan.ops.segments.token_marks`, of at most GRID_ROWS rows of its `signed_numbers`."""
    marks = torch.empty(segments.shape, dtype=torch.int8, device=segments.device)
    if marks.numel() > 0:
        rows, length = segments.shape
        _launch(segments.device, rows, length, segments.dtype)(address(segments), address(marks), length)
    return marks
