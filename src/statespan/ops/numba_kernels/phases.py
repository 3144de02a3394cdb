"""Phases of a kernel: items that begin only when all items before a certain one are finished. Imports Numba.

Items are taken in order and each is finished by the thread that took it, so waiting for earlier ones never locks up,
however many threads there are. It costs a fraction of a microsecond, a call of the next kernel several.
"""

import platform
from typing import Any

from llvmlite import ir
from numba import types

from statespan.ops.numba_kernels.vector import I64, call_llvm, jit, typed

_X86 = platform.machine() in ("x86_64", "AMD64")


@typed(types.int64, types.int64)
def _acquire(builder: Any, address: Any) -> Any:
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "acquire", 8)


@typed(types.void)
def _relax(builder: Any) -> None:
    """Tell the processor that this is a waiting loop."""
    if _X86:
        call_llvm(builder, "llvm.x86.sse2.pause", ir.VoidType())


@jit
def wait_until(finished, num_items):  # type: ignore[no-untyped-def]  # Numba infers
    """Return when `num_items` items are finished. `finished` is the kernel's first argument."""
    while _acquire(finished) < num_items:
        _relax()
