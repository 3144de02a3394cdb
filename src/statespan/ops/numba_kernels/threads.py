"""Runs a compiled kernel over its work items on PyTorch's own threads.

PyTorch's OpenMP runtime is asked for through the library that PyTorch itself uses (`GOMP_parallel`, which GNU's, LLVM's
and Intel's runtimes all export on Linux), so kernels and PyTorch share one pool and never fight for the cores. Where
there is none (Mac, Windows) a pool of Python threads does it; kernels hold no GIL. In a forked child OpenMP's threads
are gone, and waiting for them would hang: there a kernel runs on the calling thread alone.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

Entry = Callable[[ctypes.Array[ctypes.c_char]], Any]  # a kernel's C entry as a ctypes function; it holds no GIL
# Words of what an entry takes, see entry.py: the count of finished items, and where the kernel's arguments begin.
FINISHED, ARGUMENTS = 2, 8

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def num_workers(num_items: int) -> int:
    """How many threads a kernel over `num_items` uses here: at most torch.get_num_threads()."""
    return 1 if _forked else max(1, min(torch.get_num_threads(), num_items))


@cache
def _gomp_parallel() -> Any:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP runtime that PyTorch is linked to, or None."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        function = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@cache
def _executor(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="statespan")


def run(entry: Entry, address: int, call: ctypes.Array[ctypes.c_char], workers: int) -> None:
    """Let `workers` threads take work items from the buffer `call` until none is left."""
    if workers == 1 or _forked:
        entry(call)
    elif (parallel := _gomp_parallel()) is not None:
        parallel(address, call, workers, 0)
    else:
        helpers = [_executor(workers - 1).submit(entry, call) for _ in range(workers - 1)]
        entry(call)
        for helper in helpers:
            if not helper.cancel():  # a helper that has not begun is not needed any more
                helper.result()
