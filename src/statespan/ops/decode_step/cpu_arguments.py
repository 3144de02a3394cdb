"""What the prepared steps of the CPU share: which tensors the kernels take, their addresses, and how work is cut."""

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.decode_step.weights import Projection
from statespan.ops.layout import contiguous_float32
from statespan.ops.linear.cpu import ALONE_BYTES
from statespan.ops.numba_kernels import num_workers

BF16 = torch.bfloat16
FLOATS = (torch.float32, BF16)
FEW_ROWS = {torch.float32: 8, BF16: 4, torch.int8: 8}  # beyond them matrix units win
SILU, RELU = 0, 1
ACTIVATIONS = {"silu": SILU, "swiglu": SILU, "relu": RELU}  # the exact GELU stays with PyTorch
CHANNEL_BLOCK = 64
LINE = 16  # float32 values of a cache line


def num_blocks(size: int, block: int) -> int:
    return (size + block - 1) // block


def workers_for(projection: Projection, num_items: int) -> int:
    """One for a small projection, which is done before others have woken."""
    return 1 if projection.weight.nbytes < ALONE_BYTES else num_workers(num_items)


def can_run(num_rows: int, projections: list[Projection], weights: list[Tensor], exact: list[Tensor]) -> bool:
    """Whether the kernels take these: few rows, projections of one type without gaps, float32 or bfloat16 weights."""
    kind = projections[0].weight.dtype
    return (
        0 < num_rows <= FEW_ROWS.get(kind, 0)
        and all(projection.weight.dtype is kind and projection.weight.is_contiguous() for projection in projections)
        and weights[0].dtype in FLOATS
        and all(weight.dtype is weights[0].dtype and weight.is_contiguous() for weight in weights)
        and all(value.dtype is torch.float32 and value.is_contiguous() for value in exact)
    )


class Addresses:
    """Addresses of tensors for a prepared call; holds what they point to."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def of(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def projection(self, projection: Projection) -> tuple[int, int, int]:
        """Of weight, scale and bias; a bias becomes float32."""
        bias = contiguous_float32(projection.bias)
        return self.of(projection.weight), self.of(projection.scale), self.of(bias)

    def scratch(self, *sizes: int) -> list[int]:
        """Regions of float32 memory, each from a cache line on."""
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + 4 * LINE * num_blocks(size, LINE))
        first = self.of(torch.empty(starts[-1] // 4 + LINE))
        first = (first + 4 * LINE - 1) // (4 * LINE) * (4 * LINE)
        return [first + start for start in starts[:-1]]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor without gaps; the kernels only see its address."""
    if tensor.shape != shape or tensor.dtype is not dtype:
        raise UserError(
            f"decoding step: {name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}; "
            "make a new decoder for another batch size or dtype"
        )
    return tensor.contiguous()
