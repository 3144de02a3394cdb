"""Segment numbers, read token by token."""

import torch

from statespan.ops.segments import PADDING, RESTARTS, run_numbers, signed_numbers, token_marks


def test_marks_and_runs_equal_a_walk_along_the_row() -> None:
    segments = torch.randint(-2, 3, (20, 15))
    segments[0], segments[1, :7], segments[2, 5:] = -1, -1, -1
    marks, runs = token_marks(segments), run_numbers(segments)
    for row in range(20):
        last, run = None, 0
        for place, number in enumerate(segments[row].tolist()):
            restarts = number >= 0 and last is not None and number != last
            run += restarts
            last = number if number >= 0 else last
            assert marks[row, place] == (PADDING if number < 0 else RESTARTS if restarts else 0)
            assert runs[row, place] == run


def test_numbers_that_kernels_read_have_a_sign_and_no_gaps() -> None:
    assert signed_numbers(None) is None
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        segments = torch.tensor([[0, 1], [1, 1], [1, 0]]).to(dtype).t()
        found = signed_numbers(segments)
        assert found is not None and found.is_contiguous() and torch.equal(found, segments.long())
        assert found.dtype == (torch.int32 if dtype == torch.int32 else torch.int64)
