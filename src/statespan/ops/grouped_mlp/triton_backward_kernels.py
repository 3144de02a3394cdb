# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505  # without the else, Triton compiles what follows an early return too
"""The backward of the experts' MLPs in Triton: through the activation, and sums over an expert's rows.

Rows are at sorted places; the products with the experts' matrices are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from statespan.ops.grouped_mlp.triton_kernels import gelu
from statespan.ops.triton_kernels.functions import sigmoid, silu_slope


@triton.jit
def gelu_slope(x):
    """Phi(x) + x phi(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation of x (a gated one's factor) and its derivative."""
    if ACTIVATION == "swiglu" or ACTIVATION == "silu":
        gate = sigmoid(x)
        return x * gate, silu_slope(x, gate)
    elif ACTIVATION == "geglu" or ACTIVATION == "gelu":
        return gelu(x), gelu_slope(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), (x > 0).to(tl.float32)


@triton.jit(do_not_specialize=["top_k", "weight_stride", "choice_stride"])
def activation_gradients(
    grad_hidden,
    kept,
    grad_rows,
    down_bias,
    expert_index,
    expert_weight,
    order,
    ends,
    shifts,
    grad_inner,
    hidden,
    grad_weight,
    num_experts,
    inner_size,
    hidden_size,
    top_k,
    weight_stride,
    choice_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One place: grad_inner [.. f] (gated: 2f) and the activated row, both times the choice's weight; its gradient.

    Zeros between experts. kept has no such gaps.
    """
    WIDTH: tl.constexpr = 2 if GATED else 1
    place = tl.program_id(0).to(tl.int64)
    if place >= tl.cdiv(tl.load(ends + num_experts - 1), ALIGN) * ALIGN:
        return
    choice = tl.load(order + place).to(tl.int64)
    grad_row = grad_inner + place * inner_size * WIDTH
    if choice < 0:
        for start in range(0, inner_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(hidden + place * inner_size + column, 0.0, column < inner_size)
        for start in range(0, inner_size * WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(grad_row + column, 0.0, column < inner_size * WIDTH)
        return
    expert = tl.load(expert_index + choice)
    token = choice // top_k
    weight = tl.load(expert_weight + token * weight_stride + choice % top_k * choice_stride).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    row = kept + (place - tl.load(shifts + expert)) * inner_size * WIDTH
    for start in range(0, inner_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < inner_size
        grad = tl.load(grad_hidden + place * inner_size + column, mask, 0.0).to(tl.float32)
        value, slope = value_and_slope(tl.load(row + column, mask, 0.0).to(tl.float32), ACTIVATION)
        if GATED:
            up = tl.load(row + inner_size + column, mask, 0.0).to(tl.float32)
            tl.store(grad_row + inner_size + column, grad * weight * value, mask)
            slope *= up
            value *= up
        tl.store(grad_row + column, grad * weight * slope, mask)
        tl.store(hidden + place * inner_size + column, value * weight, mask)
        total += grad * value
    if down_bias is not None:
        bias = down_bias + expert * hidden_size
        for start in range(0, hidden_size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < hidden_size
            grad = tl.load(grad_rows + place * hidden_size + column, mask, 0.0).to(tl.float32)
            total += grad * tl.load(bias + column, mask, 0.0).to(tl.float32)
    tl.store(grad_weight + choice, tl.sum(total, 0))


@triton.jit
def weight_gradients(
    left,
    right,
    ends,
    y,
    left_size,
    right_size,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y_e [left right] = sum over the expert's places of left^T right; ROWS divides ALIGN."""
    expert = tl.program_id(1).to(tl.int64)
    left_blocks = tl.cdiv(left_size, LEFT)
    right_blocks = tl.cdiv(right_size, RIGHT)
    tile = tl.program_id(0)
    first = tile // (GROUP * right_blocks) * GROUP
    size = tl.minimum(left_blocks - first, GROUP)
    tile = tile % (GROUP * right_blocks)
    left_column = (first + tile % size) * LEFT + tl.arange(0, LEFT)
    right_column = tile // size * RIGHT + tl.arange(0, RIGHT)
    left_mask, right_mask = (left_column < left_size)[None], (right_column < right_size)[None]
    begin = tl.cdiv(tl.load(ends + expert - 1, expert > 0, 0), ALIGN) * ALIGN
    place = tl.arange(0, ROWS)
    left_tile = left + ((begin + place).to(tl.int64) * left_size)[:, None] + left_column[None]
    right_tile = right + ((begin + place).to(tl.int64) * right_size)[:, None] + right_column[None]
    acc = tl.zeros([LEFT, RIGHT], tl.float32)
    for _ in tl.range(begin, tl.load(ends + expert), ROWS, num_stages=STAGES):
        a = tl.load(left_tile, left_mask, 0.0)
        b = tl.load(right_tile, right_mask, 0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
        left_tile += ROWS * left_size
        right_tile += ROWS * right_size
    y_at = y + expert * left_size * right_size + left_column.to(tl.int64)[:, None] * right_size + right_column[None]
    tl.store(y_at, acc.to(y.dtype.element_ty), (left_column < left_size)[:, None] & right_mask)


@triton.jit(do_not_specialize=["top_k", "weight_stride", "choice_stride"])
def bias_gradients(
    rows,
    expert_weight,
    order,
    ends,
    y,
    columns,
    top_k,
    weight_stride,
    choice_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y_e [columns] = sum of the expert's rows, times the choices' weights where there are some."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.cdiv(tl.load(ends + expert - 1, expert > 0, 0), ALIGN) * ALIGN
    end = tl.load(ends + expert)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        place = (start + tl.arange(0, ROWS)).to(tl.int64)
        here = place < end
        mask = here[:, None] & (column < columns)[None]
        value = tl.load(rows + (place * columns)[:, None] + column[None], mask, 0.0).to(tl.float32)
        if expert_weight is not None:
            choice = tl.load(order + place, here, 0).to(tl.int64)
            weight_at = expert_weight + choice // top_k * weight_stride + choice % top_k * choice_stride
            value *= tl.load(weight_at, here, 0.0).to(tl.float32)[:, None]
        total += tl.sum(value, 0)
    tl.store(y + expert * columns + column, total, column < columns)
