"""Least kept weights on NVIDIA GPUs: tensors to the kernel of `edge.cu`. Nothing waits for the device."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from statespan.ops.cuda_kernels import address
from statespan.ops.cuda_kernels.launcher import Kernel, Launch
from statespan.ops.layout import contiguous, last_contiguous

KERNEL = Kernel(Path(__file__).with_name("edge.cu"), "sampling_edge")
SPLIT = 8  # blocks that share a row, from compute capability 9.0 on
VALUES = 64  # of a thread at the most: they stay in registers


def macros(size: int, split: int) -> dict[str, int] | None:
    """Those of `edge.cu` for rows of that size; None where a row is too long."""
    threads = 256 if size <= 256 * split * VALUES else 512
    values = -(-size // (threads * split))
    return {"SPLIT": split, "THREADS": threads, "VALUES": -(-values // 8) * 8} if values <= VALUES else None


def too_large(size: int, device: torch.device) -> str | None:
    """Why rows of that size cannot be served, in words; None where they can."""
    if macros(size, _split(device)) is None:
        return f"its kernel keeps a row in registers, and one of {size} values is too long"
    return None


def _split(device: torch.device) -> int:
    return SPLIT if torch.cuda.get_device_capability(device) >= (9, 0) else 1


@cache
def _launch(device: torch.device, rows: int, size: int) -> Launch:
    split = _split(device)
    found = macros(size, split)
    assert found is not None
    return KERNEL.launch(device, (rows * split, 1, 1), found["THREADS"], tuple(found.items()))


def sampling_edge(weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[n 1] of `statespan.ops.sampling_edge`."""
    weights, edge = last_contiguous(weights), weights.new_empty(len(weights), 1)
    if weights.numel() == 0:
        return edge.zero_()
    rows, size = weights.shape
    top_k, top_p = contiguous(top_k), contiguous(top_p)
    launch = _launch(weights.device, rows, size)
    launch(address(weights), weights.stride(0), size, address(top_k), address(top_p), address(edge))
    return edge
