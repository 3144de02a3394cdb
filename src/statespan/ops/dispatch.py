"""Which backend runs an op, why, and why the others do not.

A backend is a named implementation of an op: "reference" (the recurrence, any device), "cpu" (Numba),
"cuda" (CUDA C++ through NVRTC), "triton". Every op lists its backends here, best first; "auto" takes the first that
can run on the tensors' device, a name runs that backend or raises BackendUnavailable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import takewhile

import torch

from statespan.errors import BackendUnavailable, UnknownName, UserError
from statespan.ops.notices import say_once


@cache
def _no_numba(device: torch.device) -> str | None:
    if find_spec("numba") is None:
        return "numba is not installed; pip install numba"
    return None


@cache
def _no_cuda_core(device: torch.device) -> str | None:
    if too_old := _too_old(device):
        return too_old
    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        return "cuda-core is not installed; pip install 'statespan[cuda]'"
    from statespan.ops.cuda_kernels import compiler

    return compiler.why_not(torch.cuda.get_device_capability(device))


@cache
def _no_triton(device: torch.device) -> str | None:
    if too_old := _too_old(device):
        return too_old
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    from statespan.ops.triton_kernels import release

    return release.why_not()


def _too_old(device: torch.device) -> str | None:
    if _kind(device) == "nvidia" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or above, and {torch.cuda.get_device_name(device)} is older"
    return None


def _kind(device: torch.device) -> str:
    """ "cpu", "nvidia", "amd", or the name of another type of device."""
    if device.type == "cuda":
        return "nvidia" if torch.version.hip is None else "amd"
    return device.type


@dataclass(frozen=True)
class Backend:
    """A named way to run ops: the kinds of device (none: any) and dtypes (none: any) it has kernels for."""

    name: str
    summary: str
    kinds: tuple[str, ...] = ()
    only: str = ""  # the kinds in words
    dtypes: tuple[torch.dtype, ...] = ()
    missing: Callable[[torch.device], str | None] | None = None  # what it lacks on a device of such a kind

    def why_not(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why it cannot run on the device with tensors of these dtypes, in words; None where it can."""
        if self.kinds and _kind(device) not in self.kinds:
            return f"it runs on {self.only} only, and the tensors are on {device}"
        for dtype in dtypes:
            if self.dtypes and dtype not in self.dtypes:
                *names, last = (str(known).removeprefix("torch.") for known in self.dtypes)
                given = str(dtype).removeprefix("torch.")
                return f"its kernels take {', '.join(names)} and {last}, and a tensor is {given}"
        return self.missing(device) if self.missing else None


_HALVES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            "Numba kernels compiled at first use",
            kinds=("cpu",),
            only="the CPU",
            dtypes=(torch.float32, torch.bfloat16),
            missing=_no_numba,
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels compiled at first use, NVIDIA GPUs",
            kinds=("nvidia",),
            only="NVIDIA GPUs",
            dtypes=_HALVES,
            missing=_no_cuda_core,
        ),
        Backend(
            "triton",
            "Triton kernels compiled at first use, NVIDIA and AMD GPUs",
            kinds=("nvidia", "amd"),
            only="NVIDIA and AMD GPUs",
            dtypes=_HALVES,
            missing=_no_triton,
        ),
        Backend("torch", "vectorised PyTorch, any device"),
        Backend("reference", "the plain equations in PyTorch, any device, slow"),
    )
}

# The backends of each op, best first.
OPS: dict[str, tuple[str, ...]] = {
    "selective_scan": ("cpu", "cuda", "triton", "reference"),
    "ssd": ("triton", "torch", "reference"),
    "causal_conv1d": ("cpu", "cuda", "triton", "torch", "reference"),
    "causal_conv1d_update": ("cpu", "triton", "reference"),
    "selective_state_update": ("cpu", "triton", "reference"),
    "ssd_state_update": ("cpu", "triton", "reference"),
    "mamba1_step": ("cpu", "cuda", "torch"),
    "mamba2_step": ("cpu", "cuda", "torch"),
    "feed_forward_step": ("cpu", "cuda", "torch"),
    "head_step": ("cuda", "torch"),
    "rms_norm": ("cpu", "triton", "reference"),
    "gated_rms_norm": ("cpu", "triton", "reference"),
    "grouped_mlp": ("triton", "torch", "reference"),
    "decode_attention": ("triton", "torch", "reference"),
    "linear_cross_entropy": ("triton", "cpu", "torch", "reference"),
    "linear": ("cpu", "torch"),
    "sampling_edge": ("cuda", "torch", "reference"),
}


@cache
def resolve(
    op: str, backend: str, device: torch.device, *dtypes: torch.dtype, too_large: tuple[tuple[str, str], ...] = ()
) -> str:
    """The name of the backend that runs `op` on `device` with tensors of `dtypes`.

    `too_large` has the backends that cannot take these sizes, which the op knows, each with the reason.

    Raises UnknownName for a name that is no backend of the op, BackendUnavailable where a named one cannot run,
    UserError for a dtype that is no float's: results of the inputs' dtype would be cut off.
    """
    if backend not in ("auto", *OPS[op]):
        raise UnknownName(f"backend of {op}", backend, OPS[op])
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise UserError(f"{op}: it takes float tensors, and one is {str(dtype).removeprefix('torch.')}")
    reasons = _reasons(op, device, dtypes, too_large)
    if backend == "auto":
        if torch.float64 not in dtypes:  # which is asked for on purpose
            _tell_what_is_missed(op, device, reasons)
        return _best(reasons)
    if (reason := reasons[backend]) is not None:
        raise BackendUnavailable(f"backend {backend!r} of {op} cannot run here: {reason}")
    return backend


def _reasons(
    op: str, device: torch.device, dtypes: tuple[torch.dtype, ...], too_large: tuple[tuple[str, str], ...] = ()
) -> dict[str, str | None]:
    """Why each backend of the op cannot run, or None where it can; best first."""
    limits = dict(too_large)
    return {name: BACKENDS[name].why_not(device, dtypes) or limits.get(name) for name in OPS[op]}


def _best(reasons: dict[str, str | None]) -> str:
    return next(name for name, reason in reasons.items() if reason is None)


def _missed(reasons: dict[str, str | None], device: torch.device) -> dict[str, str]:
    """The backends passed over that are made for this kind of device, each with the reason."""
    better = takewhile(lambda item: item[1] is not None, reasons.items())
    return {name: str(reason) for name, reason in better if _kind(device) in BACKENDS[name].kinds}


def _tell_what_is_missed(op: str, device: torch.device, reasons: dict[str, str | None]) -> None:
    """Say which slower backend runs and why, where a better one is made for this kind of device; once for each cause.

    What this machine lacks is one cause: all of it is told with the first op that it slows down.
    """
    missed, slower = _missed(reasons, device), f"{op} on {device} runs on its slower backend {_best(reasons)!r}"
    if not missed:
        return
    kind = _kind(device)
    lacks = {name: backend.why_not(device, ()) for name, backend in BACKENDS.items() if kind in backend.kinds}
    about = f"missed {missed}"
    if all(lacks[name] == reason for name, reason in missed.items()):
        about, missed = f"lacks on {kind}", {name: reason for name, reason in lacks.items() if reason is not None}
        others = sum(bool(_missed(_reasons(other, device, ()), device)) for other in OPS) - 1
        slower += f", as {others} other operations do (statespan backends --device {device})"
    say_once(about, f"{slower}. {'. '.join(f'{name!r}: {reason}' for name, reason in missed.items())}")


def explain(device: torch.device) -> list[tuple[str, str, str]]:
    """Rows (op, backend, "runs" | "ready" | why not) of every op on `device`; the first ready one runs."""
    rows = []
    for op, candidates in OPS.items():
        reasons = _reasons(op, device, ())
        chosen = _best(reasons)
        rows += [(op, name, "runs" if name == chosen else reasons[name] or "ready") for name in candidates]
    return rows
