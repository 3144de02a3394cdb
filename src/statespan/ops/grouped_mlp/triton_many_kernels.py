# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""Experts' matrix products of many rows in Triton, for GPUs with a copy engine for tiles (Hopper and later).

A program takes tile after tile of a list that is made on the device: while it stores one, the next one's loads are on
their way. Tiles come through tensor descriptors, which know where a matrix ends; a tile's rows behind those of its
expert are other experts' rows, or zeros, and are not stored.
"""

import triton
import triton.language as tl

from statespan.ops.grouped_mlp.triton_kernels import activate


@triton.jit(do_not_specialize=["tiles", "blocks_first", "blocks_second"])
def schedule(
    ends,
    table,
    counts,
    num_experts,
    tiles,
    blocks_first,
    blocks_second,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists of tiles for two products of the same rows: table [2 tiles 4] of expert, first place, end and block.

    counts [2] says how many there are. Neighbours share weights (up to GROUP blocks of rows with the same outputs) and
    rows.
    """
    second = tl.program_id(1)
    blocks = tl.where(second == 0, blocks_first, blocks_second)
    e = tl.arange(0, EXPERTS)
    end = tl.load(ends + e, e < num_experts, 0)
    begin = tl.cdiv(tl.load(ends + e - 1, (e > 0) & (e < num_experts), 0), ALIGN) * ALIGN
    row_blocks = tl.where(e < num_experts, tl.cdiv(end - begin, ROWS), 0)
    last = tl.cumsum(row_blocks * blocks, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((last[None] <= tile[:, None]).to(tl.int32), 1)
    mine = expert[:, None] == e[None]
    of_expert = tl.maximum(tl.sum(tl.where(mine, row_blocks[None], 0), 1), 1)
    place = tile - tl.sum(tl.where(mine, (last - row_blocks * blocks)[None], 0), 1)
    # Equal groups: one with a single block of rows would read all weights for itself.
    each = tl.cdiv(of_expert, tl.cdiv(of_expert, GROUP))
    first = place // (each * blocks) * each
    size = tl.maximum(tl.minimum(of_expert - first, each), 1)
    place = place % (each * blocks)
    start = tl.sum(tl.where(mine, begin[None], 0), 1) + (first + place % size) * ROWS
    at, there = table + (second * tiles + tile) * 4, tile < tl.minimum(tiles, tl.max(last, 0))
    if tl.program_id(0) == 0:
        tl.store(counts + second, tl.max(last, 0))
    tl.store(at, expert, there)
    tl.store(at + 1, start, there)
    tl.store(at + 2, tl.sum(tl.where(mine, end[None], 0), 1), there)
    tl.store(at + 3, place // size, there)


@triton.jit
def halves(tile, GATED: tl.constexpr):
    """[r 2c] as two of [r c]: left and right, or gates and what they multiply, which take turns by eight.

    A thread of a matrix product has both halves of a row, so that nothing is exchanged.
    """
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    if GATED:
        pairs = tl.permute(tl.reshape(tile, [ROWS, HALF // 8, 2, 8]), [0, 1, 3, 2])
    else:
        pairs = tl.permute(tl.reshape(tile, [ROWS, 2, HALF]), [0, 2, 1])
    first, second = tl.split(pairs)
    return tl.reshape(first, [ROWS, HALF]), tl.reshape(second, [ROWS, HALF])


@triton.jit
def finish(
    inner, up, scale, bias, factor, kept, y, place, here, target, column, outputs, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Scale, bias, activation, the rows' factors and stores of some columns; up is None unless it is gated."""
    all_outputs = outputs if up is None else 2 * outputs
    inside = column < outputs
    mask = here[:, None] & inside[None]
    if scale is not None:
        inner *= tl.load(scale + column, inside, 0.0)[None]
        if up is not None:
            up *= tl.load(scale + outputs + column, inside, 0.0)[None]
    if bias is not None:
        inner += tl.load(bias + column, inside, 0.0).to(tl.float32)[None]
        if up is not None:
            up += tl.load(bias + outputs + column, inside, 0.0).to(tl.float32)[None]
    if kept is not None:
        at = kept + place.to(tl.int64)[:, None] * all_outputs + column[None]
        tl.store(at, inner.to(kept.dtype.element_ty), mask)
        if up is not None:
            tl.store(at + outputs, up.to(kept.dtype.element_ty), mask)
    value = activate(inner, up, ACTIVATION)
    if factor is not None:
        value *= factor[:, None]
    value = value.to(y.dtype.element_ty)
    tl.store(y + target.to(tl.int64)[:, None] * outputs + column[None], value, mask)


@triton.jit
def products_of_many(
    rows,
    weight,
    scale,
    bias,
    order,
    factors,
    table,
    count,
    kept,
    y,
    inputs,
    outputs,
    factor_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """act(W_e x scale + bias) for the rows [places inputs] of every expert: y [places outputs].

    With `order` it is y [choices outputs], each row times its choice's factor if there are factors.

    weight is [e outputs inputs], TURNED [e inputs outputs], GATED [e outputs/8 2 8 inputs].
    """
    HALF: tl.constexpr = COLUMNS // 2
    for tile in tl.range(tl.program_id(0), tl.load(count), tl.num_programs(0), flatten=True):
        expert, start = tl.load(table + 4 * tile), tl.load(table + 4 * tile + 1)
        stop, block = tl.load(table + 4 * tile + 2), tl.load(table + 4 * tile + 3)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.range(0, inputs, INPUTS, num_stages=STAGES):
            x = rows.load([start, k])
            if GATED:
                w = tl.trans(tl.reshape(weight.load([expert, block * (HALF // 8), 0, 0, k]), [COLUMNS, INPUTS]))
            elif TURNED:
                w = tl.reshape(weight.load([expert, k, block * COLUMNS]), [INPUTS, COLUMNS])
            else:
                w = tl.trans(tl.reshape(weight.load([expert, block * COLUMNS, k]), [COLUMNS, INPUTS]))
            acc = tl.dot(x, w, acc)

        place = start + tl.arange(0, ROWS)
        here = place < stop
        target = place if order is None else tl.load(order + place, here, 0)
        factor = None if factors is None else tl.load(factors + target * factor_stride, here, 0.0).to(tl.float32)
        first, second = halves(acc, GATED)
        first_output = expert * outputs * (2 if GATED else 1)
        scales = None if scale is None else scale + first_output
        biases = None if bias is None else bias + first_output
        if GATED:
            column = block * HALF + tl.arange(0, HALF)
            finish(first, second, scales, biases, factor, kept, y, place, here, target, column, outputs, ACTIVATION)
        else:
            column = block * COLUMNS + tl.arange(0, HALF)
            finish(first, None, scales, biases, factor, kept, y, place, here, target, column, outputs, ACTIVATION)
            finish(
                second, None, scales, biases, factor, kept, y, place, here, target, column + HALF, outputs, ACTIVATION
            )


@triton.jit
def matrix_of(tile, LEFT_BLOCKS: tl.constexpr, RIGHT_BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """Expert, block of rows and block of columns of a tile of the sums; GROUP blocks of rows take turns."""
    BLOCKS: tl.constexpr = LEFT_BLOCKS * RIGHT_BLOCKS
    block = tile % BLOCKS
    first = block // (GROUP * RIGHT_BLOCKS) * GROUP
    size = GROUP if LEFT_BLOCKS % GROUP == 0 else tl.minimum(LEFT_BLOCKS - first, GROUP)
    block = block % (GROUP * RIGHT_BLOCKS)
    return tile // BLOCKS, first + block % size, block // size


@triton.jit
def places_of(ends, expert, num_experts, ALIGN: tl.constexpr):
    """Where an expert's places begin and end; 0 and 0 behind the last expert."""
    here = expert < num_experts
    begin = tl.cdiv(tl.load(ends + expert - 1, here & (expert > 0), 0), ALIGN) * ALIGN
    return begin, tl.load(ends + expert, here, 0)


@triton.jit
def store_half(y, half, matrix, row, column, PARTS: tl.constexpr):
    """Columns of y_matrix by one copy, or by two through half the memory if a tile is stored in 4 PARTS."""
    ROWS: tl.constexpr = half.shape[0]
    COLUMNS: tl.constexpr = half.shape[1]
    half = half.to(y.dtype)
    if PARTS == 2:
        y.store([matrix, row, column], tl.reshape(half, [1, ROWS, COLUMNS]))
    else:
        tl.static_assert(PARTS == 4)
        first, second = halves(half, False)
        y.store([matrix, row, column], tl.reshape(first, [1, ROWS, COLUMNS // 2]))
        y.store([matrix, row, column + COLUMNS // 2], tl.reshape(second, [1, ROWS, COLUMNS // 2]))


@triton.jit
def sums_of_many(
    left,
    right,
    ends,
    y,
    num_experts,
    EXPERTS: tl.constexpr,
    LEFT_BLOCKS: tl.constexpr,
    RIGHT_BLOCKS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y_e [left right] = sum over the expert's places of left^T right; ROWS divides ALIGN.

    One loop over the steps of all of this program's tiles, so that a tile's loads are on their way while the one before
    is stored. Triton flattens no loops whose length is read from memory: what is loaded next and what is summed up
    are two walks through the tiles here. An expert's first and last place are read a tile ahead. How many blocks there
    are is known to the compiler: between two tiles the matrix units would wait for divisions.
    """
    BLOCKS: tl.constexpr = LEFT_BLOCKS * RIGHT_BLOCKS
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, EXPERTS)
    begin, end = places_of(ends, e, num_experts, ALIGN)
    tiles = tl.cdiv((e + 1) * BLOCKS - program, programs) - tl.cdiv(e * BLOCKS - program, programs)
    steps = tl.sum(tl.where(e < num_experts, tiles * tl.maximum(tl.cdiv(end - begin, ROWS), 1), 0), 0)

    loaded, summed = program, program
    expert, left_block, right_block = matrix_of(loaded, LEFT_BLOCKS, RIGHT_BLOCKS, GROUP)
    row, stop = places_of(ends, expert, num_experts, ALIGN)
    next_row, next_stop = places_of(ends, (loaded + programs) // BLOCKS, num_experts, ALIGN)
    sum_row, sum_stop, sum_next_row, sum_next_stop = row, stop, next_row, next_stop
    acc = tl.zeros([LEFT, RIGHT], tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        a, b = left.load([row, left_block * LEFT]), right.load([row, right_block * RIGHT])
        row += ROWS
        if row >= stop:
            loaded += programs
            expert, left_block, right_block = matrix_of(loaded, LEFT_BLOCKS, RIGHT_BLOCKS, GROUP)
            row, stop = next_row, next_stop
            next_row, next_stop = places_of(ends, (loaded + programs) // BLOCKS, num_experts, ALIGN)
        acc = tl.dot(tl.trans(a), b, acc)
        sum_row += ROWS
        if sum_row >= sum_stop:
            matrix, row_block, column_block = matrix_of(summed, LEFT_BLOCKS, RIGHT_BLOCKS, GROUP)
            acc = tl.where(sum_row - ROWS < sum_stop, acc, 0.0)  # an expert without rows takes a step too
            first, second = halves(acc, False)
            first_row, first_column = row_block * LEFT, column_block * RIGHT
            store_half(y, first, matrix, first_row, first_column, PARTS)
            store_half(y, second, matrix, first_row, first_column + RIGHT // 2, PARTS)
            acc = tl.zeros([LEFT, RIGHT], tl.float32)
            summed += programs
            sum_row, sum_stop = sum_next_row, sum_next_stop
            sum_next_row, sum_next_stop = places_of(ends, (summed + programs) // BLOCKS, num_experts, ALIGN)
