"""Kernel: the host's handle of a compiled kernel, and scratch memory for it."""

import ctypes
import struct
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from statespan.ops.numba_kernels import compiler, threads

PreparedCall = Callable[..., None]


class Kernel:
    """A kernel `function(item, worker, *ints, *floats)` of a module, compiled when it first runs.

    Args:
        module: Full name of the module that defines the function; it is imported only to compile.
        function: Its name there.
        ints: Names of the int64 arguments: addresses (given as tensors or None), sizes, strides, flags. Where the first
            is `finished`, the kernel has phases (see `phases.py`) and gets it without being given.
        floats: Names of the float32 arguments, which follow the ints.
    """

    def __init__(self, module: str, function: str, ints: str, floats: str = "") -> None:
        self.module, self.function = module, function
        self.ints, self.floats = tuple(ints.split()), tuple(floats.split())
        self._phased = self.ints[0] == "finished"
        self._names = self.ints[self._phased :] + self.floats
        self._layout = struct.Struct("=4q32x" + "q" * len(self.ints) + "d" * len(self.floats))
        self._buffer = ctypes.c_char * self._layout.size
        self._entry: Any = None
        self._address = 0

    def __call__(self, num_items: int, *, workers: int | None = None, **arguments: Tensor | float | None) -> None:
        """Run items 0 .. num_items - 1, each once, on `workers` threads (default: torch.get_num_threads()).

        Tensors become their addresses and None becomes 0. Give workers=1 for work of a few microseconds.
        """
        if len(arguments) != len(self._names):
            raise TypeError(f"{self.function} takes {self._names}, got {tuple(arguments)}")
        values = [arguments[name] for name in self._names]
        words = [value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in values]
        self.launch(num_items, workers or threads.num_workers(num_items), *words)

    def launch(self, num_items: int, workers: int, *words: float) -> None:
        """The bare call, some microseconds cheaper: the arguments in their order, tensors as addresses.

        For what every generated token does a hundred times. The caller keeps the tensors alive.
        """
        if self._entry is None:
            self.compile()
        call = self._buffer()
        if self._phased:
            words = (ctypes.addressof(call) + 8 * threads.FINISHED, *words)
        self._layout.pack_into(call, 0, 0, 0, 0, num_items, *words)
        threads.run(cast(threads.Entry, self._entry), self._address, call, workers)

    def prepare(self, num_items: int, workers: int, num_varying: int, *words: float) -> PreparedCall:
        """A call whose first `num_varying` arguments are given each time, the others (`words`) now."""
        if self._entry is None:
            self.compile()
        call = self._buffer()
        head = (ctypes.addressof(call) + 8 * threads.FINISHED,) if self._phased else ()
        self._layout.pack_into(call, 0, 0, 0, 0, num_items, *head, *[0] * num_varying, *words)
        changing = struct.Struct("=4q32x" + "q" * (len(head) + num_varying))
        entry = cast(threads.Entry, self._entry)

        def run(*addresses: int) -> None:
            changing.pack_into(call, 0, 0, 0, 0, num_items, *head, *addresses)
            threads.run(entry, self._address, call, workers)

        return run

    def compile(self) -> None:
        """Compile now, or load from the disk, what the first call would."""
        with compiler.lock:
            if self._entry is None:
                self._address = compiler.load(self.module, self.function, self.ints, self.floats)
                self._entry = compiler.CFunction(self._address)


def scratch(workers: int, floats: int) -> Tensor:
    """Uninitialised float32 memory, one row of at least `floats` for each worker, rows on separate cache lines."""
    return torch.empty(workers, (floats + 31) // 32 * 32, dtype=torch.float32)
