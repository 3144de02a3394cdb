# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""Softmax cross entropy of rows of logits, and its gradient in their place; a program has one row."""

import triton
import triton.language as tl

EACH = tl.constexpr(8)  # neighbours that a lane has: a load of 16 bytes, and one rescaling of its sum
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(logits, place, valid, width):
    """The logits times log2(e), minus infinity in columns that do not count."""
    value = tl.load(logits + place, place < width, 0.0).to(tl.float32) * LOG2_E
    return tl.where(place < valid, value, float("-inf"))


@triton.jit
def losses_and_gradients(
    logits, labels, token_scale, losses, valid, width, GRADIENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """The row's loss; with GRADIENTS, logits become (softmax - one_hot(label)) * token_scale.

    Rows are `width` apart, and loaded and stored whole: `valid` columns count, the others hold anything and become 0.
    A negative label counts for nothing, one that is no column gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    column = tl.arange(0, BLOCK // EACH)[:, None] * EACH + tl.arange(0, EACH)[None]
    # Every lane has its own running maximum and sum, so that the loop has no barrier.
    highest = tl.full([BLOCK // EACH], -1e38, tl.float32)
    total = tl.zeros([BLOCK // EACH], tl.float32)
    picked = tl.zeros([BLOCK // EACH], tl.float32)
    for start in range(0, width, BLOCK):
        value = _scaled(logits, start + column, valid, width)
        higher = tl.maximum(highest, tl.max(value, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(value - higher[:, None]), 1)
        highest = higher
        picked += tl.sum(tl.where(start + column == label, value, 0.0), 1)
    most = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - most), 0)
    loss = (most + tl.log2(total) - tl.sum(picked, 0)) / LOG2_E
    loss = tl.where(label >= valid, float("nan"), loss)
    tl.store(losses + row, tl.where(label < 0, 0.0, loss))
    if GRADIENTS:
        scale = 1.0
        if token_scale is not None:
            scale = tl.load(token_scale + row).to(tl.float32)
        factor = scale / total
        for start in range(0, width, BLOCK):
            place = start + column
            grad = tl.exp2(_scaled(logits, place, valid, width) - most) * factor
            grad -= tl.where(place == label, scale, 0.0)
            grad = tl.where(label < 0, 0.0, grad)
            tl.store(logits + place, grad.to(logits.dtype.element_ty), place < width)
