"""Side-by-side timing: the candidates take turns, so that a drifting machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over the repetitions."""

    median_s: float
    spread: float  # (largest - smallest) / median


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repetitions: int = 5,
    seconds_each: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run each candidate once to warm up, then in turns; one that has used up `seconds_each` drops out."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repetitions):
        for name, run in candidates.items():
            if sum(seconds[name]) > seconds_each:
                continue
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: Timing(statistics.median(s), (max(s) - min(s)) / statistics.median(s)) for name, s in seconds.items()}
