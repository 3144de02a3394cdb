"""Freed memory stays with the process."""

import subprocess
import sys

CODE = """
import resource, torch
from statespan.training.allocator import keep_freed_memory
kept = keep_freed_memory() if {keep} else True
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(int(kept), faults())
"""


def faults(keep: bool) -> tuple[int, int]:
    run = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return int(kept), int(count)


def test_memory_asked_for_again_costs_no_page_faults() -> None:
    kept, count = faults(keep=True)
    if kept:  # Linux with glibc
        assert count < 1000
        assert faults(keep=False)[1] > 4 * 10_000  # 64 MiB of 4 KiB pages, each time
    else:
        assert sys.platform != "linux"
