"""A compiled kernel on a device, called with addresses and integers."""

import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.errors import first_line
from statespan.ops.cuda_kernels.compiler import cubin, cuda_core

Macros = tuple[tuple[str, str | int], ...]

_SCALARS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def scalar_type(dtype: torch.dtype) -> str:
    """The C++ name, in device.cuh, of the dtype."""
    return _SCALARS[dtype]


def address(tensor: Tensor | None) -> int:
    """Where the tensor's first element is; None is a null pointer."""
    return 0 if tensor is None else tensor.data_ptr()


class Kernel:
    """A kernel `extern "C"` of a file; `shared_bytes` of dynamic shared memory, as much as the kind of GPU has."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self._name = file, name
        self._loaded: dict[tuple[int, Macros], Any] = {}

    def launch(
        self,
        device: torch.device,
        grid: tuple[int, int, int],
        threads: int,
        macros: Macros,
        shared_bytes: int = 0,
    ) -> "Launch":
        """The kernel compiled with `macros` for `device`, and a division of the work; to be made once and kept."""
        key = (device.index, macros)
        if key not in self._loaded:
            self._loaded[key] = self._load(*key, shared_bytes)
        config = cuda_core().LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)
        return Launch(device.index, self._loaded[key], config)

    def _load(self, device: int, macros: Macros, shared_bytes: int) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        code = cubin(self.file, f"sm_{major}{minor}", dict(macros))
        try:
            with torch.cuda.device(device):
                kernel = cuda_core().ObjectCode.from_cubin(code).get_kernel(self._name)
                if shared_bytes:
                    _allow_shared(kernel, shared_bytes, device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise torch.OutOfMemoryError(f"{self._name}: {first_line(error)}") from error
            raise
        return kernel


class Launch:
    """A call passes every argument as 8 bytes: addresses, and integers as int64.

    It launches on PyTorch's current stream of the device and returns at once.
    """

    def __init__(self, device: int, kernel: Any, config: Any) -> None:
        self._device, self._kernel, self._config, self._launch = device, kernel, config, cuda_core().launch

    def __call__(self, *arguments: int) -> None:
        """Launch the kernel."""
        device = self._device
        if device not in _entered.__dict__:
            _enter(device)
        stream = _stream(torch.cuda.current_stream(device).cuda_stream, device)
        if device == torch.cuda.current_device():
            self._launch(stream, self._config, self._kernel, *arguments)
        else:
            with torch.cuda.device(device):
                self._launch(stream, self._config, self._kernel, *arguments)


_entered: Any = threading.local()


def _enter(device: int) -> None:
    """Give this thread the device's context, which PyTorch does only when it calls the driver itself."""
    with torch.cuda.device(device):
        cuda_core().Device(device).set_current()
    _entered.__dict__[device] = True


@cache
def _stream(handle: int, device: int) -> Any:
    return cuda_core().Stream.from_handle(handle)


def _allow_shared(kernel: Any, count: int, device: int) -> None:
    """More dynamic shared memory than the 48 KiB of static and dynamic together that a block gets without asking."""
    driver = import_module("cuda.bindings.driver")
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(limit, count, driver.CUkernel(int(kernel.handle)), driver.CUdevice(device))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"a kernel needs {count} bytes of shared memory, and the driver says {error}")
