"""Freed memory stays with the process."""

import subprocess
import sys

CODE = """
import ctypes, resource, torch
getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: all pages are of 4 KiB
from statespan.training.allocator import keep_freed_memory
kept = keep_freed_memory() if {keep} else True
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(2):
        torch.zeros(9 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), min(faults() for _ in range(4)))  # once a small piece may take the place
"""


def faults(keep: bool) -> tuple[int, int]:
    run = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return int(kept), int(count)


def test_memory_asked_for_again_costs_no_page_faults() -> None:
    kept, count = faults(keep=True)
    if kept:  # Linux with glibc
        assert count < 1000
        assert faults(keep=False)[1] > 2 * 9000  # 36 MiB of 4 KiB pages, each time: more than malloc ever keeps
    else:
        assert sys.platform != "linux"
