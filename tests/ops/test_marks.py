"""Tokens' marks by one kernel on a GPU."""

import pytest
import torch

from statespan.ops.segments import kernel_marks, token_marks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 127, 129, 700, 4097])
def test_marks_by_a_kernel_are_the_same(length: int, dtype: torch.dtype) -> None:
    segments = torch.randint(-2, 3, (40, 2 * length)).to(dtype)
    segments[0], segments[1, : 2 * length - 2], segments[2, 2:] = -1, -1, -1
    segments[3:20] = segments[3:20].where(torch.rand(17, 2 * length) < 2 / length, -1)  # long stretches of padding
    segments[20:30] = (torch.arange(2 * length) // 29).to(dtype)
    for part in (segments, segments[:, ::2], segments[:, 1 : 1 + length], segments[:0]):
        found = kernel_marks(part.cuda())
        assert found.dtype == torch.int8
        assert torch.equal(found.cpu(), token_marks(part))
