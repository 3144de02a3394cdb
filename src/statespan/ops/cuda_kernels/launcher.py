"""A compiled kernel on a device, called with addresses and integers."""

import ctypes
import struct
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
    """A kernel `extern "C"` of a file; `shared_bytes` of dynamic shared memory, as much as the kind of GPU has.

    With own_instructions it is compiled for "sm_90a" and the like: with instructions of one kind of GPU only.
    """

    def __init__(self, file: Path, name: str, own_instructions: bool = False) -> None:
        self.file, self._name, self.suffix = file, name, "a" if own_instructions else ""
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
        return Launch(self._name, device.index, self._loaded[key], (*grid, threads, 1, 1, shared_bytes))

    def _load(self, device: int, macros: Macros, shared_bytes: int) -> Any:
        major, minor = torch.cuda.get_device_capability(device)
        code = cubin(self.file, f"sm_{major}{minor}{self.suffix}", dict(macros))
        try:
            with torch.cuda.device(device):
                kernel = cuda_core().ObjectCode.from_cubin(code).get_kernel(self._name)
                if shared_bytes:
                    allow_shared(kernel, shared_bytes, device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise torch.OutOfMemoryError(f"{self._name}: {first_line(error)}") from error
            raise
        return kernel


class Launch:
    """A call passes every argument as 8 bytes: addresses, and integers as int64; always as many.

    It launches on PyTorch's current stream of the device and returns at once. The arguments go to the driver from
    memory that stays: `cuda.core.launch` makes an object of each, which takes several times as long.
    """

    def __init__(self, name: str, device: int, kernel: Any, sizes: tuple[int, ...]) -> None:
        self._name, self._device, self._kernel, self._sizes = name, device, kernel, sizes
        self._function = _driver().CUfunction(int(kernel.handle))
        self._launch, self._success = _driver().cuLaunchKernel, _driver().CUresult.CUDA_SUCCESS
        self._lock = threading.Lock()  # the driver copies the arguments before it returns
        self._arguments: Any = None

    def __call__(self, *arguments: int) -> None:
        """Launch the kernel."""
        device = self._device
        enter(device)
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*arguments)
        with self._lock:
            if self._arguments is None:
                self._arguments = _Arguments(len(arguments))
            (status,) = self._launch(
                self._function, *self._sizes, current_stream(device), self._arguments.place(arguments), 0
            )
        if status != self._success:
            kind = torch.OutOfMemoryError if "OUT_OF_MEMORY" in status.name else RuntimeError
            raise kind(f"{self._name}: {status.name}")
        return None


class _Arguments:
    """Room for as many values of 8 bytes, and the list of their places that the driver takes."""

    def __init__(self, count: int) -> None:
        self._values = (ctypes.c_int64 * count)()
        at = ctypes.addressof(self._values)
        self._places = (ctypes.c_void_p * count)(*range(at, at + 8 * count, 8))
        self._address = ctypes.addressof(self._places)
        self._write = struct.Struct(f"{count}q").pack_into

    def place(self, arguments: tuple[int, ...]) -> int:
        """Write the values; the list's address."""
        self._write(self._values, 0, *arguments)
        return self._address


def current_stream(device: int) -> Any:
    """PyTorch's current stream of the device, as the driver knows it."""
    # torch.cuda.current_stream makes an object at each call, which takes 3 us.
    handle = torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportPrivateUsage]  # no other is as quick
    return _stream(handle)


_entered: Any = threading.local()


def enter(device: int) -> None:
    """Give this thread the device's context, which PyTorch does only when it calls the driver itself."""
    if device in _entered.__dict__:
        return
    with torch.cuda.device(device):
        cuda_core().Device(device).set_current()
    _entered.__dict__[device] = True


@cache
def _stream(handle: int) -> Any:
    return _driver().CUstream(handle)


@cache
def _driver() -> Any:
    return import_module("cuda.bindings.driver")


def allow_shared(kernel: Any, count: int, device: int) -> None:
    """More dynamic shared memory than the 48 KiB of static and dynamic together that a block gets without asking."""
    driver = _driver()
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(limit, count, driver.CUkernel(int(kernel.handle)), driver.CUdevice(device))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"a kernel needs {count} bytes of shared memory, and the driver says {error}")
