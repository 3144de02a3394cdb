"""A kernel of a decoding step with everything but its addresses fixed, launched so that it may begin early."""

from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statespan.ops.cuda_kernels import allow_shared, enter
from statespan.ops.cuda_kernels.compiler import cubin, cuda_core

HERE = Path(__file__).parent
UNASKED_BYTES = 40 << 10  # of dynamic shared memory; with the static part a block gets 48 KiB without asking


class Launch:
    """`name` of `name.cu`, compiled with `macros`. A call passes tensors as addresses, integers as int64.

    From compute capability 9.0 on a kernel begins while the one before it still runs, and waits inside for its results.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        grid: tuple[int, int],
        threads: int,
        macros: Mapping[str, str | int],
        shared_bytes: int = 0,
        cluster: int = 1,  # blocks that work together; `grid` counts such groups
        cooperative: bool = False,  # all blocks are on the device at once; such a kernel does not begin early
        own_instructions: bool = False,  # it uses what only this generation of GPUs has
    ) -> None:
        capability = torch.cuda.get_device_capability(device)
        self._device = device
        arch = "sm_{}{}".format(*capability) + ("a" if own_instructions else "")
        self._kernel = _load(name, device.index, arch, tuple(sorted(macros.items())))
        self._options: dict[str, Any] = {"grid": (*grid, 1), "block": threads, "shmem_size": shared_bytes}
        if cooperative:
            self._options["is_cooperative"] = True
        elif capability >= (9, 0) and _has_early_launches():
            self._options["programmatic_stream_serialization"] = True
        if cluster > 1:
            self._options["cluster"] = (cluster, 1, 1)
        if shared_bytes > UNASKED_BYTES:
            allow_shared(self._kernel, shared_bytes, device.index)

    @cached_property
    def _config(self) -> Any:
        return cuda_core().LaunchConfig(**self._options)

    def __call__(self, *arguments: Tensor | int | None) -> None:
        enter(self._device.index)
        values = [0 if a is None else a if isinstance(a, int) else a.data_ptr() for a in arguments]
        handle = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            cuda_core().launch(_stream(handle), self._config, self._kernel, *values)


def clusters(device: torch.device, size: int) -> bool:
    """Whether blocks can be launched in groups of `size`."""
    return size == 1 or (torch.cuda.get_device_capability(device) >= (9, 0) and _has_early_launches())


@cache
def _load(name: str, device: int, arch: str, macros: tuple[tuple[str, str | int], ...]) -> Any:
    code = cubin(HERE / f"{name}.cu", arch, dict(macros))
    with torch.cuda.device(device):
        cuda_core().Device(device).set_current()
        return cuda_core().ObjectCode.from_cubin(code).get_kernel(name)


@cache
def _has_early_launches() -> bool:
    return hasattr(cuda_core().LaunchConfig, "programmatic_stream_serialization")


@cache
def _stream(handle: int) -> Any:
    return cuda_core().Stream.from_handle(handle)
