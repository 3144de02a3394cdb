# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505  # without the else, Triton compiles what follows an early return too
"""Experts' matrix products in Triton: tiles of one expert's weights and its rows, with all that comes after them.

Choices and places are those of `triton_routing_kernels.py`.
"""

import triton
import triton.language as tl

from statespan.ops.grouped_mlp.triton_routing_kernels import sorted_tile
from statespan.ops.triton_kernels.functions import sigmoid


@triton.jit
def gelu(x):
    """x Phi(x), the exact one."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(inner, up, ACTIVATION: tl.constexpr):
    """The activation of `inner`; a gated one times `up`."""
    if ACTIVATION == "swiglu":
        return inner * sigmoid(inner) * up
    elif ACTIVATION == "silu":
        return inner * sigmoid(inner)
    elif ACTIVATION == "geglu":
        return gelu(inner) * up
    elif ACTIVATION == "gelu":
        return gelu(inner)
    elif ACTIVATION == "relu":
        return tl.maximum(inner, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "none")
        return inner


@triton.jit
def widen(source, target, count, BLOCK: tl.constexpr):
    """Values in the dtype of the target."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, place < count).to(target.dtype.element_ty), place < count)


@triton.jit
def store_unserved(expert_index, y, choices, num_experts, outputs, first_column, COLUMNS: tl.constexpr):
    """Some columns of y [choices outputs] for choices that no expert serves: zeros, or NaN for an unknown expert."""
    column = first_column + tl.arange(0, COLUMNS)
    for choice in range(choices):
        expert = tl.load(expert_index + choice)
        if (expert < 0) | (expert >= num_experts):
            value = tl.where(expert == -1, tl.zeros([COLUMNS], tl.float32), float("nan"))
            tl.store(y + choice * outputs + column, value.to(y.dtype.element_ty), column < outputs)


# Counts are not specialised: each of 1, multiples of 16 and others would be compiled for itself.
@triton.jit(do_not_specialize=["choices", "source_share", "factor_stride", "splits"])
def products(
    x,
    weight,
    bias,
    scale,
    expert_index,
    order,
    ends,
    factors,
    kept,
    y,
    choices,
    num_experts,
    inputs,
    outputs,
    x_stride,
    source_share,
    factor_stride,
    expert_stride,
    output_stride,
    input_stride,
    splits,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """act(W_e x + bias) of OUTPUTS outputs for ROWS rows of one expert: y [splits rows outputs].

    Without `order` the choices are few, up to CHOICES, and unsorted: a program of an expert (or of a choice, if it is
    the first of its expert) finds those that belong to it and takes them ROWS at a time. With it the rows are sorted
    places; GATHER reads x at the choice's row, SCATTER writes y there. The tile is W x^T unless WIDE: narrow blocks
    of rows leave the matrix units a full side of weights, and int8 weights are widened in registers. With `factors`
    each row is multiplied by its choice's, and the rows of few choices that name no expert are stored too.
    """
    output_blocks = tl.cdiv(outputs, OUTPUTS)
    if order is None:
        slot, block = tl.program_id(1), tl.program_id(0)
        any_choice = tl.arange(0, CHOICES)
        chosen = tl.load(expert_index + any_choice, any_choice < choices, -1)
        expert = tl.load(expert_index + slot).to(tl.int32) if BY_CHOICE else slot
        mine = chosen == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        start, stop = 0, tl.sum(mine.to(tl.int32), 0)
        first = tl.min(tl.where(mine, any_choice, CHOICES), 0)
        nothing = (first != slot if BY_CHOICE else first == CHOICES) | (expert < 0) | (expert >= num_experts)
        last = stop if CHOICES > ROWS else 1
        if factors is not None:  # noqa: SIM102  # decided when it compiles
            if slot == 0:
                lost = (any_choice < choices) & ((chosen < 0) | (chosen >= num_experts))
                if tl.sum(lost.to(tl.int32), 0) > 0:
                    store_unserved(expert_index, y, choices, num_experts, outputs, block * OUTPUTS, OUTPUTS)
    else:
        expert, start, stop, block = sorted_tile(ends, num_experts, output_blocks, EXPERTS, ROWS, GROUP, ALIGN)
        nothing = expert >= num_experts
        last = start + 1
    if nothing:
        return
    # A gated tile is two blocks of the weights' rows, of the gate and of what it multiplies, with the same outputs.
    COLUMNS: tl.constexpr = 2 * OUTPUTS if GATED else OUTPUTS
    column = tl.arange(0, COLUMNS)
    output = block * OUTPUTS + column % OUTPUTS if GATED else block * OUTPUTS + column
    column = output + column // OUTPUTS * outputs if GATED else output
    all_outputs = outputs * (2 if GATED else 1)
    row = expert.to(tl.int64) * all_outputs + column
    split = tl.program_id(2)
    each = tl.cdiv(tl.cdiv(inputs, INPUTS), splits) * INPUTS
    begin = split * each
    in_tile = tl.arange(0, INPUTS)
    w_begin = weight + expert.to(tl.int64) * expert_stride + (column.to(tl.int64) * output_stride)[:, None]
    w_begin += ((begin + in_tile).to(tl.int64) * input_stride)[None]
    w_mask = (output < outputs)[:, None]
    for first_place in range(start, last, ROWS):
        place = first_place + tl.arange(0, ROWS)
        if order is None:
            if CHOICES > ROWS:
                here = place < stop
                choice = tl.sum(tl.where(mine[None] & (rank[None] == place[:, None]), any_choice[None], 0), 1)
            else:
                here, choice = mine, place
            source, target = choice // source_share, choice
        else:
            here = place < stop
            choice = tl.load(order + place, here, 0) if GATHER or SCATTER else place
            source = choice // source_share if GATHER else place
            target = choice if SCATTER else place
        source, target = tl.where(here, source, 0), target.to(tl.int64)
        x_tile = x + (source.to(tl.int64) * x_stride)[:, None] + (begin + in_tile)[None]
        w_tile = w_begin
        acc = tl.zeros([ROWS, COLUMNS] if WIDE else [COLUMNS, ROWS], tl.float32)
        for k in tl.range(begin, tl.minimum(begin + each, inputs), INPUTS, num_stages=STAGES):
            if EVEN:
                rows = tl.load(x_tile, here[:, None], 0.0)
                w = tl.load(w_tile, w_mask, 0.0)
            else:
                rows = tl.load(x_tile, here[:, None] & (k + in_tile < inputs)[None], 0.0)
                w = tl.load(w_tile, w_mask & (k + in_tile < inputs)[None], 0.0)
            if WIDE:
                acc = tl.dot(rows, tl.trans(w.to(rows.dtype)), acc, input_precision="ieee")
            else:
                acc = tl.dot(w.to(rows.dtype), tl.trans(rows), acc, input_precision="ieee")
            x_tile += INPUTS
            w_tile += INPUTS * input_stride
        if not WIDE:
            acc = tl.trans(acc)

        if scale is not None:
            acc *= tl.load(scale + row, output < outputs, 0.0)[None]
        if bias is not None:  # noqa: SIM102  # decided when it compiles
            if split == 0:
                acc += tl.load(bias + row, output < outputs, 0.0).to(tl.float32)[None]
        up = acc
        if GATED:
            acc, up = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, OUTPUTS]), [0, 2, 1]))
        y_column = block * OUTPUTS + tl.arange(0, OUTPUTS)
        mask = here[:, None] & (y_column < outputs)[None]
        if kept is not None:
            kept_at = kept + (target * all_outputs)[:, None] + y_column[None]
            tl.store(kept_at, acc.to(kept.dtype.element_ty), mask)
            if GATED:
                tl.store(kept_at + outputs, up.to(kept.dtype.element_ty), mask)
        # Narrowed before it is stored: half as much is rearranged on the way.
        value = activate(acc, up, ACTIVATION)
        if factors is not None:
            value *= tl.load(factors + target * factor_stride, here, 0.0).to(tl.float32)[:, None]
        value = value.to(y.dtype.element_ty)
        tl.store(y + ((split * choices + target) * outputs)[:, None] + y_column[None], value, mask)
