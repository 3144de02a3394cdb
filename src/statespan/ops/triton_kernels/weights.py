# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""Small work on weights and their gradients, in one launch where PyTorch takes several, or longer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statespan.ops.triton_kernels import on
from statespan.ops.triton_kernels.launcher import launch

MOST = 4  # weights that are cast together
BLOCK, WARPS = 4096, 4  # values of a program that casts
ROWS, COLUMNS = 64, 32  # parts that a program adds at once, and columns that it owns
RUN_ROWS, RUN_COLUMNS = 8, 512  # the same of rows with one id


@triton.jit
def _cast(x, y, size, program, BLOCK: tl.constexpr):
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, place < size).to(y.dtype.element_ty), place < size)


@triton.jit(do_not_specialize=["second", "third", "fourth"])
def cast_all(x0, x1, x2, x3, y0, y1, y2, y3, size0, size1, size2, size3, second, third, fourth, BLOCK: tl.constexpr):
    """y = x of up to four tensors; programs from `second`, `third` and `fourth` on have the others."""
    program = tl.program_id(0)
    if program < second:
        _cast(x0, y0, size0, program, BLOCK)
    elif program < third:
        if x1 is not None:
            _cast(x1, y1, size1, program - second, BLOCK)
    elif program < fourth:
        if x2 is not None:
            _cast(x2, y2, size2, program - third, BLOCK)
    elif x3 is not None:
        _cast(x3, y3, size3, program - fourth, BLOCK)


@triton.jit
def add_parts(parts, first, others, num_parts, columns, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over the parts [num_parts columns]; columns from `split` on are those of `others`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_parts, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + row * columns + column[None], (row < num_parts) & (column < columns)[None], 0.0)
    found = tl.sum(total, 0)
    tl.store(first + column, found.to(first.dtype.element_ty), column < split)
    if others is not None:
        there = (column >= split) & (column < columns)
        tl.store(others + (column - split), found.to(others.dtype.element_ty), there)


@triton.jit
def add_runs(total, rows, ids, ends, order, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """total[id] += the sum of the rows with that id.

    `ids` are sorted, `ends` says where the run of each ends, and `order` where its row lies.
    """
    first = tl.program_id(0)
    own, end = tl.load(ids + first), tl.load(ends + first)
    if tl.load(ids + first - 1, first > 0, -1) != own:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        here = column < columns
        at = total + own.to(tl.int64) * columns + column
        before = tl.load(at, here, 0.0)
        found = tl.load(rows + tl.load(order + first) * columns + column, here, 0.0).to(tl.float32)
        for start in range(first + 1, end, ROWS):  # most ids come once
            place = start + tl.arange(0, ROWS)
            row = tl.load(order + place, place < end, 0)[:, None] * columns
            values = tl.load(rows + row + column[None], (place < end)[:, None] & here[None], 0.0)
            found += tl.sum(values.to(tl.float32), 0)
        tl.store(at, (found + before.to(tl.float32)).to(total.dtype.element_ty), here)


def cast(dtype: torch.dtype, weights: list[Tensor]) -> list[Tensor]:
    """Up to four contiguous tensors in `dtype`."""
    found = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    absent = [None] * (MOST - len(weights))
    sizes = [weight.numel() for weight in weights]
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + -(-size // BLOCK))
    ends += ends[-1:] * len(absent)
    with on(weights[0].device):
        launch(
            cast_all,
            (ends[-1],),
            *(*weights, *absent, *found, *absent, *sizes, *(0 for _ in absent), *ends[1:MOST]),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return found


def sum_of_parts(parts: Tensor, *outputs: Tensor) -> None:
    """The sums over the parts [p c] in float32, in fixed order: one output, or two that divide the columns."""
    first, others = outputs if len(outputs) == 2 else (outputs[0], None)
    with on(parts.device):
        launch(
            add_parts,
            (-(-parts.shape[1] // COLUMNS),),
            *(parts, first, others, *parts.shape, first.numel()),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """total[id] += row, for ids [r] int64 and rows [r c], both tensors of rows contiguous; in fixed order."""
    if rows.numel() == 0:
        return
    ordered, order = torch.sort(ids.int(), stable=True)  # half the passes of int64
    ends = torch.searchsorted(ordered, ordered, right=True, out_int32=True)
    with on(total.device):
        launch(
            add_runs,
            (len(rows), -(-rows.shape[1] // RUN_COLUMNS)),
            *(total, rows, ordered, ends, order, rows.shape[1]),
            ROWS=RUN_ROWS,
            COLUMNS=RUN_COLUMNS,
            num_warps=WARPS,
        )
