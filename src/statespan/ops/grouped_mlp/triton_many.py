"""Experts' products of many rows on GPUs that copy tiles by descriptors: tensors to `triton_many_kernels.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from statespan.ops.activation import GATED
from statespan.ops.gpu import hopper, multiprocessors, shared_memory
from statespan.ops.grouped_mlp import triton_kernels as plain_kernels
from statespan.ops.grouped_mlp import triton_many_kernels as kernels
from statespan.ops.grouped_mlp.experts import WIDENED
from statespan.ops.grouped_mlp.triton_routing import Sorted
from statespan.ops.layout import contiguous
from statespan.ops.triton_kernels import power_of_two
from statespan.ops.triton_kernels.launcher import start

MANY = 96  # rows an expert on average from which its products are bound by the matrix units
WIDEN_BLOCK = 8192
SHARED = 200 << 10
GROUP = 16  # most blocks of rows that go through the same weights side by side
SHORT_SUMS = 384  # rows an expert below which fewer a step of the sums spare more than they cost
SCHEDULE_VALUES = 1 << 11  # of a program's one-hot matrix [tiles experts]


@dataclass(frozen=True)
class Tile:
    """Sizes of a program: weights' rows (of a gated product half of them gate) x rows x inputs a step, steps, warps."""

    weights: int = 256
    rows: int = 128
    inputs: int = 64
    stages: int = 4
    warps: int = 8


TILE = Tile()


def serves(x: Tensor, weights: tuple[Tensor, ...], choices: int) -> bool:
    """Whether there are so many rows, and tiles of all matrices can be described; int8 ones once they are widened."""
    rows = choices // len(weights[0])
    whole = all(
        weight.is_contiguous() and weight.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in weight.shape[1:])
        and (weight.dtype == x.dtype or (weight.dtype == torch.int8 and rows >= WIDENED))
        for weight in weights
    )  # fmt: skip
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return whole and narrow and shared_memory(x.device) >= SHARED and rows > MANY


def widened(weight: Tensor, x: Tensor, rows: int) -> Tensor:
    """int8 weights exactly in the dtype of x, where that pays; their scales still come with the outputs."""
    if weight.dtype != torch.int8 or x.dtype == torch.float32 or rows < WIDENED:
        return weight
    wide, source = torch.empty(weight.shape, dtype=x.dtype, device=x.device), weight.contiguous()
    start(
        plain_kernels.widen,
        (-(-wide.numel() // WIDEN_BLOCK),),
        source,
        wide,
        wide.numel(),
        BLOCK=WIDEN_BLOCK,
        num_warps=8,
    )
    return wide


@dataclass(frozen=True)
class Schedule:
    """Tiles of two products of the same rows: table [2 tiles 4] and counts [2], int32, on the device."""

    table: Tensor
    counts: Tensor


def schedule(places: Sorted, choices: int, *columns: int) -> Schedule:
    """For products with so many columns (a gated one's pairs count as two)."""
    num_experts = len(places.ends)
    bins = power_of_two(num_experts)
    blocks = [-(-size // TILE.weights) for size in columns]
    tiles = (choices // TILE.rows + min(choices, num_experts)) * max(blocks)
    table, counts = places.ends.new_empty(2, tiles, 4), places.ends.new_empty(2)
    block = max(16, min(256, SCHEDULE_VALUES // bins))
    start(kernels.schedule, (-(-tiles // block), 2),
        places.ends, table, counts, num_experts, tiles, *blocks,
        EXPERTS=bins, ROWS=TILE.rows, GROUP=GROUP, ALIGN=places.align, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return Schedule(table, counts)


def products(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    tiles: Schedule,
    which: int,
    y: Tensor,
    activation: str = "none",
    *,
    kept: Tensor | None = None,
    order: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """y [.. outputs] of rows [places inputs]: weight [e outputs inputs] (gated: 2 outputs), or that of a transpose.

    With order, y is by choice, and each row times its factor [t 1].
    """
    gated, turned = activation in GATED, weight.stride(2) != 1
    start(
        kernels.products_of_many,
        (min(tiles.table.shape[1], multiprocessors(rows.device)),),
        TensorDescriptor.from_tensor(rows, [TILE.rows, TILE.inputs]),
        _pairs(weight) if gated else _matrices(weight, turned),
        contiguous(scale),
        contiguous(bias),
        order,
        factors,
        tiles.table[which],
        tiles.counts[which:],
        kept,
        y,
        weight.shape[2],
        y.shape[1],
        0 if factors is None else factors.stride(0),
        ACTIVATION=activation,
        GATED=gated,
        TURNED=turned,
        ROWS=TILE.rows,
        COLUMNS=TILE.weights,
        INPUTS=TILE.inputs,
        STAGES=TILE.stages,
        num_warps=TILE.warps,
    )


def _pairs(weight: Tensor) -> TensorDescriptor:
    """[e 2f h] as [e f/8 2 8 h]: eight rows of gates, then the eight of what they multiply."""
    num_experts, twice, inputs = weight.shape
    shape = [num_experts, twice // 16, 2, 8, inputs]
    strides = [twice * inputs, 8 * inputs, twice // 2 * inputs, inputs, 1]
    return TensorDescriptor(weight, shape, strides, [1, TILE.weights // 16, 2, 8, TILE.inputs])


def _matrices(weight: Tensor, turned: bool) -> TensorDescriptor:
    if turned:
        return TensorDescriptor.from_tensor(weight.mT, [1, TILE.inputs, TILE.weights])
    return TensorDescriptor.from_tensor(weight, [1, TILE.weights, TILE.inputs])


def _steps_of_sums(rows: int, device: torch.device) -> tuple[int, int, int]:
    """Rows of a step, steps at once and parts of a tile when it is stored, for so many rows an expert."""
    if not hopper(device):
        return TILE.inputs, TILE.stages, 4  # there is no memory for larger parts
    return (TILE.inputs // 2, 2 * TILE.stages, 2) if rows < SHORT_SUMS else (TILE.inputs, TILE.stages, 2)


def weight_gradients(left: Tensor, right: Tensor, places: Sorted, y: Tensor) -> None:
    """y [e left right]: the sums over each expert's rows of left^T right; rows between experts are zeros."""
    left_blocks, right_blocks = -(-left.shape[1] // TILE.rows), -(-right.shape[1] // TILE.weights)
    tiles = left_blocks * right_blocks * len(places.ends)
    rows, stages, parts = _steps_of_sums(len(left) // len(places.ends), left.device)
    start(
        kernels.sums_of_many,
        (min(tiles, multiprocessors(left.device)),),
        TensorDescriptor.from_tensor(left, [rows, TILE.rows]),
        TensorDescriptor.from_tensor(right, [rows, TILE.weights]),
        places.ends,
        TensorDescriptor.from_tensor(y, [1, TILE.rows, TILE.weights // parts]),
        len(places.ends),
        EXPERTS=power_of_two(len(places.ends)),
        LEFT_BLOCKS=left_blocks,
        RIGHT_BLOCKS=right_blocks,
        LEFT=TILE.rows,
        RIGHT=TILE.weights,
        ROWS=rows,
        GROUP=GROUP,
        ALIGN=places.align,
        PARTS=parts,
        STAGES=stages,
        num_warps=TILE.warps,
    )
