"""Seconds until Statespan is there: its import, and the first scan with kernels on the disk and without.

    python -m benchmarks.cpu_startup [--repetitions 5]

Every figure comes from fresh processes. The import alone loads nothing, so it is also measured with the public names
looked up, which loads torch and all that they need; "ours" is that after torch was imported. The first scan includes
loading or compiling its kernel, and nothing before it; the cold cache is an empty folder.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.record import Row, report

# Each prints seconds.
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
IMPORT = TIMED.format("import statespan")
NAMES = TIMED.format("import statespan; [getattr(statespan, name) for name in statespan.__all__]")
NAMES_OURS = f"import torch; {NAMES}"
FIRST_SCAN = """
import time, torch
from statespan.ops import selective_scan
u, dt, z = torch.randn(3, 1, 64, 1536).unbind(0)
A, B, C = -torch.rand(1536, 16), torch.randn(1, 64, 1, 16), torch.randn(1, 64, 1, 16)
start = time.perf_counter()
selective_scan(u, dt, A, B, C, torch.ones(1536), z)
print(time.perf_counter() - start)
"""
COLD_REPETITIONS = 3


def seconds(code: str, cache: str | None = None) -> float:
    """What `code` prints in a fresh process, with the kernel cache in another folder where one is given."""
    environment = dict(os.environ) if cache is None else {**os.environ, "NUMBA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def row(task: str, goal: float, found: list[float]) -> Row:
    """Median and goal."""
    median = statistics.median(found)
    return Row(task, "statespan", median, "s", (max(found) - min(found)) / median, f"goal < {goal} s")


def measure(repetitions: int) -> list[Row]:
    """All rows; warm figures after one run that fills the disk's caches."""
    rows: list[Row] = []
    warm = {
        "import": (IMPORT, 1.5),
        "import and all public names": (NAMES, 1.5),
        "import and all public names, ours": (NAMES_OURS, 0.2),
        "first scan, warm cache": (FIRST_SCAN, 0.4),
    }
    for task, (code, goal) in warm.items():
        seconds(code)
        rows.append(row(task, goal, [seconds(code) for _ in range(repetitions)]))
    cold: list[float] = []
    for _ in range(COLD_REPETITIONS):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(seconds(FIRST_SCAN, cache))
    return [*rows, row("first scan, cold cache", 10, cold)]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="fresh processes a figure; cold ones: 3")
    rows = measure(parser.parse_args().repetitions)
    report("cpu_startup", rows, ["statespan", "torch", "numba"])


if __name__ == "__main__":
    main()
