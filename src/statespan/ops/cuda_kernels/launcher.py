"""A compiled kernel on a device, called with tensors and integers."""

import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.ops.cuda_kernels.compiler import cubin, cuda_core

Macros = Mapping[str, str | int]

_SCALARS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def scalar_type(tensor: Tensor) -> str:
    """The C++ name, in device.cuh, of the tensor's dtype."""
    return _SCALARS[tensor.dtype]


class Kernel:
    """The kernels `extern "C"` of one file.

    A call passes every argument as 8 bytes: tensors as addresses, None as a null pointer, integers as int64. It
    launches on PyTorch's current stream of the tensors' device and returns at once.
    """

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        self._loaded: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        macros: tuple[tuple[str, str | int], ...],
        *arguments: Tensor | int | None,
    ) -> None:
        """Launch on `device` with `threads` threads a block, compiled with `macros`."""
        core = cuda_core()
        key = (device.index, macros)
        kernel = self._loaded.get(key)
        if kernel is None:
            kernel = self._loaded[key] = self._load(device, dict(macros))
        values = [0 if a is None else a if isinstance(a, int) else a.data_ptr() for a in arguments]
        config = core.LaunchConfig(grid=grid, block=threads)
        _enter(device.index)
        handle = torch.cuda.current_stream(device).cuda_stream
        if device.index == torch.cuda.current_device():
            core.launch(_stream(handle, device.index), config, kernel, *values)
        else:
            with torch.cuda.device(device):
                core.launch(_stream(handle, device.index), config, kernel, *values)

    def _load(self, device: torch.device, macros: Macros) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        code = cubin(self._file, f"sm_{major}{minor}", macros)
        with torch.cuda.device(device):
            return cuda_core().ObjectCode.from_cubin(code).get_kernel(self._name)


_entered = threading.local()


def _enter(device: int) -> None:
    """Give this thread the device's context, which PyTorch does only when it calls the driver itself."""
    seen = _entered.__dict__.setdefault("devices", set())
    if device not in seen:
        with torch.cuda.device(device):
            cuda_core().Device(device).set_current()
        seen.add(device)


@cache
def _stream(handle: int, device: int) -> Any:
    return cuda_core().Stream.from_handle(handle)
