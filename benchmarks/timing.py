"""Side-by-side timing: the candidates take turns, so that a drifting machine slows all of them alike."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over the repetitions."""

    median_s: float
    spread: float  # (largest - smallest) / median


def time_in_turns(
    candidates: Mapping[str, Callable[[], object]], *, repetitions: int = 5, seconds_each: float = 20.0
) -> dict[str, Timing]:
    """Run each candidate once to warm up, then in turns; one that has used up `seconds_each` drops out."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repetitions):
        for name, run in candidates.items():
            if sum(seconds[name]) > seconds_each:
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), (max(s) - min(s)) / statistics.median(s)) for name, s in seconds.items()}


def peak_mib(run: Callable[[], object]) -> float:
    """Growth of the process's resident memory while `run` runs, in MiB, sampled each millisecond (Linux)."""
    peak = before = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
