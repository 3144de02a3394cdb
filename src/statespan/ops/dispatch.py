"""Which backend runs an op, why, and why the others do not.

A backend is a named implementation of an op: "reference" (the recurrence, any device), "cpu" (Numba),
"cuda" (CUDA C++ through NVRTC), "triton". Every op lists its backends here, best first; "auto" takes the first that
can run on the tensors' device, a name runs that backend or raises BackendUnavailable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from statespan.errors import BackendUnavailable, UnknownName


@cache
def _why_not_numba() -> str | None:
    if find_spec("numba") is None:
        return "numba is not installed; pip install numba"
    return None


def _why_not_cpu(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU only, and the tensors are on {device}"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16):
            return f"its kernels take float32 and bfloat16, and a tensor is {str(dtype).removeprefix('torch.')}"
    return _why_not_numba()


@cache
def _why_not_cuda_core() -> str | None:
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "cuda-core is not installed; pip install 'statespan[cuda]'"
    try:
        from statespan.ops.cuda_kernels.compiler import nvrtc_version

        nvrtc_version()
    except Exception as error:
        return f"NVRTC does not load ({str(error).splitlines()[0][:80]}); pip install 'statespan[cuda]'"
    return None


def _why_not_cuda(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it runs on NVIDIA GPUs only, and the tensors are on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or above, and {torch.cuda.get_device_name(device)} is older"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            return f"its kernels take float32, bfloat16 and float16, and a tensor is {name}"
    return _why_not_cuda_core()


@cache
def _why_not_triton_package() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


def _why_not_triton(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if device.type != "cuda":
        return f"it runs on NVIDIA and AMD GPUs only, and the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or above, and {torch.cuda.get_device_name(device)} is older"
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            return f"its kernels take float32, bfloat16 and float16, and a tensor is {name}"
    return _why_not_triton_package()


def _never(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """A named way to run ops."""

    name: str
    summary: str
    why_not: Callable[[torch.device, tuple[torch.dtype, ...]], str | None]  # None: it can run on that device


BACKENDS = {
    "cpu": Backend("cpu", "Numba kernels compiled at first use", _why_not_cpu),
    "cuda": Backend("cuda", "CUDA C++ kernels compiled at first use, NVIDIA GPUs", _why_not_cuda),
    "triton": Backend("triton", "Triton kernels compiled at first use, NVIDIA and AMD GPUs", _why_not_triton),
    "torch": Backend("torch", "vectorised PyTorch, any device", _never),
    "reference": Backend("reference", "the plain equations in PyTorch, any device, slow", _never),
}

# The backends of each op, best first.
OPS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("cpu", "cuda", "reference"),
    "ssd": ("torch", "reference"),
    "causal_conv1d": ("cpu", "triton", "torch", "reference"),
    "causal_conv1d_update": ("cpu", "triton", "reference"),
    "selective_state_update": ("cpu", "triton", "reference"),
    "ssd_state_update": ("cpu", "triton", "reference"),
    "mamba1_step": ("cpu", "torch"),
    "mamba2_step": ("cpu", "torch"),
    "feed_forward_step": ("cpu", "torch"),
    "rms_norm": ("cpu", "triton", "reference"),
    "gated_rms_norm": ("cpu", "triton", "reference"),
    "grouped_mlp": ("torch", "reference"),
    "linear_cross_entropy": ("triton", "cpu", "torch", "reference"),
    "linear": ("cpu", "torch"),
}


@cache
def resolve(
    op: str, backend: str, device: torch.device, *dtypes: torch.dtype, too_large: tuple[tuple[str, str], ...] = ()
) -> str:
    """The name of the backend that runs `op` on `device` with tensors of `dtypes`.

    `too_large` has the backends that cannot take these sizes, which the op knows, each with the reason.

    Raises UnknownName for a name that is no backend of the op, BackendUnavailable where a named one cannot run.
    """
    candidates, limits = OPS[op], dict(too_large)
    if backend == "auto":
        able = (name for name in candidates if name not in limits)
        return next(name for name in able if BACKENDS[name].why_not(device, dtypes) is None)
    if backend not in candidates:
        raise UnknownName(f"backend of {op}", backend, candidates)
    reason = BACKENDS[backend].why_not(device, dtypes) or limits.get(backend)
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} of {op} cannot run here: {reason}")
    return backend


def explain(device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (op, backend, "runs" | "ready" | why not) of every op on `device`; the first ready one runs."""
    rows = []
    for op, candidates in OPS.items():
        chosen = resolve(op, "auto", device)
        for name in candidates:
            reason = BACKENDS[name].why_not(device, ())
            rows.append((op, name, "runs" if name == chosen else reason or "ready"))
    return rows
