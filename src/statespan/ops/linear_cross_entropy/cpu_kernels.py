# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""Softmax, loss and gradient of rows of logits, for Numba. Imported only to compile.

A work item is one row, a token's. It stays in the second-level cache between the three passes.
"""

import math

from statespan.ops.numba_kernels.loads import get_lane, store_scalar_bf16
from statespan.ops.numba_kernels.special_functions import exp2
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    broadcast,
    horizontal_max,
    horizontal_sum,
    jit,
    load_any,
    load_int64,
    load_scalar,
    load_scalar_bf16,
    maximum,
    store_any,
    store_scalar,
    zeros,
)

LOG2_E = 1 / math.log(2)


@jit
def _value(row, i, bf16):
    if bf16 != 0:
        return load_scalar_bf16(row, i)
    return load_scalar(row, i)


@jit
def _power(logits, largest):
    """e^(logits - largest)."""
    return exp2((logits - largest) * LOG2_E)


@jit
def _largest(row, size, bf16):
    whole = size // WIDTH * WIDTH
    found = broadcast(_value(row, 0, bf16))
    for i in range(0, whole, WIDTH):
        found = maximum(found, load_any(row, i, WIDTH, bf16))
    largest = horizontal_max(found)
    for i in range(whole, size):
        largest = max(largest, _value(row, i, bf16))
    return largest


@jit
def _sum_of_powers(row, size, largest, bf16):
    whole, total = size // WIDTH * WIDTH, zeros()
    for i in range(0, whole, WIDTH):
        total = total + _power(load_any(row, i, WIDTH, bf16), largest)
    result = horizontal_sum(total)
    for i in range(whole, size):
        result += get_lane(_power(broadcast(_value(row, i, bf16)), largest), 0)
    return result


def losses_and_gradients(
    item, worker, logits, labels, scale, sums, differences, vocab_size, row_stride, gradients, bf16
):
    """sum(e^(x - max)) and max - x[label] of a row, whose loss is log(sum) + difference.

    With `gradients` the row becomes scale * (softmax(x) - onehot(label)).
    """
    row, label = logits + item * row_stride * (4 - 2 * bf16), load_int64(labels, item)
    chosen, largest = _value(row, label, bf16), _largest(row, vocab_size, bf16)
    total = _sum_of_powers(row, vocab_size, broadcast(largest), bf16)
    store_scalar(sums, item, total)
    store_scalar(differences, item, largest - chosen)
    if gradients != 0:
        weight = 1.0
        if scale != 0:
            weight = load_scalar(scale, item)
        factor = broadcast(weight / total)
        for i in range(0, vocab_size, WIDTH):
            value = _power(load_any(row, i, vocab_size - i, bf16), largest) * factor
            store_any(row, i, value, vocab_size - i, bf16)
        of_label = get_lane(_power(broadcast(chosen), broadcast(largest)) * factor, 0) - weight
        if bf16 != 0:
            store_scalar_bf16(row, label, of_label)
        else:
            store_scalar(row, label, of_label)
