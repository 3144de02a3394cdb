# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""Choices sorted by expert, rows to their places and back, in Triton.

A choice is a number in [0, t k), token t's j-th being t k + j; a place is its rank when choices are sorted by expert.
Experts' places begin at multiples of ALIGN; `order` is -1 between the end of one and the beginning of the next.
"""

import triton
import triton.language as tl

from statespan.ops.triton_kernels.functions import both


@triton.jit(do_not_specialize=["choices", "blocks_each"])
def count(expert_index, counts, choices, blocks_each, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """How often each expert was chosen among this program's choices: counts [programs EXPERTS]."""
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    first = tl.program_id(0).to(tl.int64) * blocks_each * BLOCK
    for block in range(blocks_each):
        choice = first + block * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(expert_index + choice, choice < choices, -1)
        total += tl.sum((chosen[:, None] == expert[None]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EXPERTS + expert, total)


@triton.jit(do_not_specialize=["choices", "blocks_each", "programs"])
def sort(
    expert_index,
    counts,
    order,
    ends,
    shifts,
    choices,
    num_experts,
    blocks_each,
    programs,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Stable sort by expert: order [place] -> choice, ends [e] of the experts, and how far ALIGN shifts each."""
    expert, row = tl.arange(0, EXPERTS), tl.arange(0, 16)
    totals, befores = tl.zeros([16, EXPERTS], tl.int32), tl.zeros([16, EXPERTS], tl.int32)
    for first_row in range(0, programs, 16):
        program = (first_row + row)[:, None]
        found = tl.load(counts + program * EXPERTS + expert[None], program < programs, 0)
        totals += found
        befores += tl.where(program < tl.program_id(0), found, 0)
    total, before = tl.sum(totals, 0), tl.sum(befores, 0)
    total = tl.where(expert < num_experts, total, 0)
    room = tl.cdiv(total, ALIGN) * ALIGN
    begin = tl.cumsum(room, 0) - room
    if tl.program_id(0) == 0:
        tl.store(ends + expert, begin + total, expert < num_experts)
        if ALIGN > 1:
            tl.store(shifts + expert, begin - (tl.cumsum(total, 0) - total), expert < num_experts)
            gap = tl.arange(0, ALIGN)
            tl.store(order + (begin + total)[:, None] + gap[None], -1, (total[:, None] + gap[None]) < room[:, None])
    begin += before
    first = tl.program_id(0).to(tl.int64) * blocks_each * BLOCK
    for block in range(blocks_each):
        choice = first + block * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(expert_index + choice, choice < choices, -1)
        hit = (chosen[:, None] == expert[None]).to(tl.int32)
        rank = tl.sum(hit * (begin[None] + tl.cumsum(hit, 0) - 1), 1)
        tl.store(order + rank, choice.to(tl.int32), (chosen >= 0) & (chosen < num_experts))
        begin += tl.sum(hit, 0)


@triton.jit
def sorted_tile(
    ends,
    num_experts,
    output_blocks,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """This program's expert, its first place, the place where the expert's end, and its block of outputs.

    Programs near each other share weights (up to GROUP blocks of rows with the same outputs) and rows. Beyond the last
    tile the expert is num_experts.
    """
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, e < num_experts, 0)
    begin = tl.cdiv(tl.load(ends + e - 1, (e > 0) & (e < num_experts), 0), ALIGN) * ALIGN
    row_blocks = tl.where(e < num_experts, tl.cdiv(end - begin, ROWS), 0)
    last_tile = tl.cumsum(row_blocks * output_blocks, 0)
    tile = tl.program_id(0)
    expert = tl.sum((last_tile <= tile).to(tl.int32), 0)
    mine = e == expert
    stop = tl.sum(tl.where(mine, end, 0), 0)
    start = tl.sum(tl.where(mine, begin, 0), 0)
    blocks = tl.maximum(tl.sum(tl.where(mine, row_blocks, 0), 0), 1)
    tile -= tl.sum(tl.where(mine, last_tile - row_blocks * output_blocks, 0), 0)
    # Equal groups: one with a single block of rows would read all weights for itself.
    each = tl.cdiv(blocks, tl.cdiv(blocks, GROUP))
    first = tile // (each * output_blocks) * each
    size = tl.maximum(tl.minimum(blocks - first, each), 1)
    tile = tile % (each * output_blocks)
    return tl.where(expert < EXPERTS, expert, num_experts), start + (first + tile % size) * ROWS, stop, tile // size


@triton.jit(do_not_specialize=["top_k"])
def gather(x, order, ends, rows, num_experts, columns, top_k, x_stride, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """rows [place] = the row of the place's token, zeros between experts; behind the last they are left as they are."""
    place = tl.program_id(0).to(tl.int64)
    if place >= tl.cdiv(tl.load(ends + num_experts - 1), ALIGN) * ALIGN:
        return
    choice = tl.load(order + place)
    token = (choice // top_k).to(tl.int64)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        value = tl.load(x + token * x_stride + column, both(mask, choice >= 0), 0.0)
        tl.store(rows + place * columns + column, value, mask)


@triton.jit
def fill_unserved(expert_index, y, tokens, num_experts, hidden_size, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """y_t of each token that no expert serves: zero, or NaN where its index names no expert."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.load(expert_index + token, token < tokens, 0)
    value = tl.where(expert == -1, 0.0, float("nan"))
    unserved = (expert < 0) | (expert >= num_experts)
    if tl.sum(unserved.to(tl.int32), 0) > 0:
        for start in range(0, hidden_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = y + token.to(tl.int64)[:, None] * hidden_size + column[None]
            row = tl.broadcast_to(value[:, None], [TOKENS, BLOCK]).to(y.dtype.element_ty)
            tl.store(at, row, unserved[:, None] & (column < hidden_size)[None])


@triton.jit(do_not_specialize=["choices", "splits", "weight_stride", "choice_stride"])
def combine(
    rows,
    expert_index,
    expert_weight,
    y,
    choices,
    num_experts,
    hidden_size,
    weight_stride,
    choice_stride,
    splits,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y_t = sum_j w_tj (sum of the splits of choice t k + j); NaN where an index names no expert."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden_size
    total = tl.zeros([BLOCK], tl.float32)
    for j in range(TOP_K):
        choice = token * TOP_K + j
        expert = tl.load(expert_index + choice)
        here = both(mask, (expert >= 0) & (expert < num_experts))
        value = tl.zeros([BLOCK], tl.float32)
        for split in range(splits):
            at = (choice + split * choices) * hidden_size
            value += tl.load(rows + at + column, here, 0.0).to(tl.float32)
        if expert_weight is not None:
            weight = tl.load(expert_weight + token * weight_stride + j * choice_stride).to(tl.float32)
            value = tl.where(here, value * weight, 0.0)
        total += value
        unknown = (expert < -1) | (expert >= num_experts)
        total = tl.where(unknown, float("nan"), total)
    tl.store(y + token * hidden_size + column, total, mask)
