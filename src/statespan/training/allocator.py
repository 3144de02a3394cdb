"""The process's memory allocator while it trains on the CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next step; returns whether it does.

    A training step frees and asks for the same gigabytes each time. Given back to the system, every page of them costs
    a fault: a tenth of the step of a 130M model. Elsewhere than on Linux with glibc this does nothing.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
