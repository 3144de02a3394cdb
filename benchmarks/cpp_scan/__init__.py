"""The selective scan in C++ with AVX-512 intrinsics: what the Numba kernels are measured against.

`scan.cpp` has the layout, the features (softplus, skip, gate), the polynomials and the chunks of ours, written by hand:
the forward holds 16 states of 16 channels in registers, which a compiler of Python may not manage. It is built with
g++ when it is wanted, into a temporary folder, and shares PyTorch's threads.
"""

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from statespan.ops.numba_kernels.host import has_avx512

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
CHUNK, BLOCK_CHANNELS, STATES = 32, 128, 16  # as in scan.cpp
INPUTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
GRADIENTS = ("u", "dt", "z", "A", "D", "dt_bias", "B", "C")


def available(channels: int, states: int) -> bool:
    """Whether this machine can build and run it, and the shape is one that it has."""
    return shutil.which("g++") is not None and has_avx512() and states == STATES and channels % 16 == 0


def _addresses(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class CppScan:
    """The built library."""

    def __init__(self) -> None:
        source = Path(__file__).parent / "scan.cpp"
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "scan.so"
            subprocess.run(["g++", *FLAGS, str(source), "-o", str(target)], check=True)
            self.library = ctypes.CDLL(str(target))

    def forward(self, x: dict[str, Tensor], keep_starts: bool = False) -> tuple[Tensor, Tensor]:
        """y [b t d], and the states before each chunk."""
        batch, length, channels = x["u"].shape
        chunks = -(-length // CHUNK) if keep_starts else 0
        y, starts = torch.empty_like(x["u"]), torch.empty(batch, chunks, STATES, channels)
        self.library.scan_forward(
            (ctypes.c_int64 * 3)(batch, length, channels),
            _addresses([x[name] for name in INPUTS]),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_void_p(starts.data_ptr() if keep_starts else None),
        )
        return y, starts

    def forward_backward(self, x: dict[str, Tensor], grad_y: Tensor) -> dict[str, Tensor]:
        """Gradients of all inputs after a forward."""
        batch, length, channels = x["u"].shape
        blocks = -(-channels // BLOCK_CHANNELS)
        _, starts = self.forward(x, keep_starts=True)
        shapes = {name: (batch, *x[name].shape) for name in ("A", "D", "dt_bias")}
        shapes |= dict.fromkeys(("B", "C"), (batch, blocks, length, 1, STATES))
        parts = {name: torch.empty(shapes.get(name, x[name].shape)) for name in GRADIENTS}
        self.library.scan_backward(
            (ctypes.c_int64 * 3)(batch, length, channels),
            _addresses([x[name] for name in INPUTS]),
            _addresses(list(parts.values())),
            ctypes.c_void_p(grad_y.data_ptr()),
            ctypes.c_void_p(starts.data_ptr()),
        )
        sum_over = dict.fromkeys(("A", "D", "dt_bias"), 0) | {"B": 1, "C": 1}
        return {name: part.sum(sum_over[name]) if name in sum_over else part for name, part in parts.items()}
