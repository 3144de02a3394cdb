# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""Softmax cross entropy of rows of logits, and its gradient in their place; a program has one row."""

import triton
import triton.language as tl


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
    column = tl.arange(0, BLOCK)
    # Every lane has its own running maximum and sum, so that the loop has no barrier.
    highest = tl.full([BLOCK], -1e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    picked = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        place = start + column
        value = tl.load(logits + place, place < width, 0.0).to(tl.float32)
        value = tl.where(place < valid, value, float("-inf"))
        higher = tl.maximum(highest, value)
        total = total * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
        picked += tl.where(place == label, value, 0.0)
    most = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - most), 0)
    loss = tl.where(label >= valid, float("nan"), most + tl.log(total) - tl.sum(picked, 0))
    tl.store(losses + row, tl.where(label < 0, 0.0, loss))
    if GRADIENTS:
        scale = 1.0
        if token_scale is not None:
            scale = tl.load(token_scale + row).to(tl.float32)
        factor = scale / total
        for start in range(0, width, BLOCK):
            place = start + column
            value = tl.load(logits + place, place < width, 0.0).to(tl.float32)
            value = tl.where(place < valid, value, float("-inf"))
            grad = tl.exp(value - most) * factor - tl.where(place == label, scale, 0.0)
            grad = tl.where(label < 0, 0.0, grad)
            tl.store(logits + place, grad.to(logits.dtype.element_ty), place < width)
