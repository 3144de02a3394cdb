"""Segment numbers, read token by token."""

import torch

from statespan.ops.segments import PADDING, RESTARTS, run_numbers, token_marks


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
