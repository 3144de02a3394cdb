# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""Matrix products that stream the weights once, for Numba. Imported only to compile.

A work item is a block of weight rows, read from the first to the last as one stream. The few rows of x are float32 and
stay in the cache.
"""

from statespan.ops.numba_kernels.loads import load_first_int8_as_float, load_int8_as_float, store_scalar_bf16
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    horizontal_sum,
    jit,
    load,
    load_any,
    load_first,
    load_scalar,
    prefetch,
    store_scalar,
    zeros,
)

FLOAT32, BFLOAT16, INT8 = 0, 1, 2
AHEAD = 4096


@jit
def _weights(row, c, kind):
    if kind == INT8:
        return load_int8_as_float(row, c)
    return load_any(row, c, WIDTH, kind)


@jit
def _first_weights(row, c, count, kind):
    if kind == INT8:
        return load_first_int8_as_float(row, c, count)
    return load_any(row, c, count, kind)


@jit
def _bytes(kind):
    """Size of one weight."""
    if kind == INT8:
        return 1
    if kind == BFLOAT16:
        return 2
    return 4


@jit
def _prefetch(row, i, count, kind):
    """Ask for the weights AHEAD bytes behind the `count` ones at i: without it narrow ones come late."""
    first = row + i * _bytes(kind) + AHEAD
    for offset in range(0, count * _bytes(kind), 64):
        prefetch(first + offset)


@jit
def _dot(row, x, inputs, kind):
    """The product of a weight row and one row of x."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    i = 0
    while i + 4 * WIDTH <= inputs:
        _prefetch(row, i, 4 * WIDTH, kind)
        a = _weights(row, i, kind) * load(x, i) + a
        b = _weights(row, i + WIDTH, kind) * load(x, i + WIDTH) + b
        c = _weights(row, i + 2 * WIDTH, kind) * load(x, i + 2 * WIDTH) + c
        d = _weights(row, i + 3 * WIDTH, kind) * load(x, i + 3 * WIDTH) + d
        i += 4 * WIDTH
    while i + WIDTH <= inputs:
        a = _weights(row, i, kind) * load(x, i) + a
        i += WIDTH
    if i < inputs:
        b = _first_weights(row, i, inputs - i, kind) * load_first(x, i, inputs - i) + b
    return horizontal_sum((a + b) + (c + d))


@jit
def _dot_4(row, x, inputs, kind):
    """The products of a weight row and four rows of x."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    a2, b2, c2, d2 = zeros(), zeros(), zeros(), zeros()
    i = 0
    while i + 2 * WIDTH <= inputs:
        _prefetch(row, i, 2 * WIDTH, kind)
        w = _weights(row, i, kind)
        a = w * load(x, i) + a
        b = w * load(x, inputs + i) + b
        c = w * load(x, 2 * inputs + i) + c
        d = w * load(x, 3 * inputs + i) + d
        i += WIDTH
        w = _weights(row, i, kind)
        a2 = w * load(x, i) + a2
        b2 = w * load(x, inputs + i) + b2
        c2 = w * load(x, 2 * inputs + i) + c2
        d2 = w * load(x, 3 * inputs + i) + d2
        i += WIDTH
    while i < inputs:
        count = min(WIDTH, inputs - i)
        w = _first_weights(row, i, count, kind)
        a = w * load_first(x, i, count) + a
        b = w * load_first(x, inputs + i, count) + b
        c = w * load_first(x, 2 * inputs + i, count) + c
        d = w * load_first(x, 3 * inputs + i, count) + d
        i += WIDTH
    return horizontal_sum(a + a2), horizontal_sum(b + b2), horizontal_sum(c + c2), horizontal_sum(d + d2)


@jit
def _finish(y, index, value, output, scale, bias, y_bf16):
    if scale != 0:
        value = value * load_scalar(scale, output)
    if bias != 0:
        value = value + load_scalar(bias, output)
    if y_bf16 != 0:
        store_scalar_bf16(y, index, value)
    else:
        store_scalar(y, index, value)


@jit
def _linear(item, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16, kind):
    for o in range(item * outputs_per_item, min(outputs, (item + 1) * outputs_per_item)):
        row, r = weight + o * row_stride * _bytes(kind), 0
        while r + 4 <= rows:
            v0, v1, v2, v3 = _dot_4(row, x + r * inputs * 4, inputs, kind)
            _finish(y, r * outputs + o, v0, o, scale, bias, y_bf16)
            _finish(y, (r + 1) * outputs + o, v1, o, scale, bias, y_bf16)
            _finish(y, (r + 2) * outputs + o, v2, o, scale, bias, y_bf16)
            _finish(y, (r + 3) * outputs + o, v3, o, scale, bias, y_bf16)
            r += 4
        while r < rows:
            value = _dot(row, x + r * inputs * 4, inputs, kind)
            _finish(y, r * outputs + o, value, o, scale, bias, y_bf16)
            r += 1


def linear_float32(
    item, worker, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16
):
    """y [rows outputs] = (x [rows inputs] W^T) * scale + bias."""
    _linear(
        item, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16, FLOAT32
    )  # fmt: skip


def linear_bfloat16(
    item, worker, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16
):
    """`linear_float32` for bfloat16 weights."""
    _linear(
        item, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16, BFLOAT16
    )  # fmt: skip


def linear_int8(item, worker, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16):
    """`linear_float32` for int8 weights."""
    _linear(
        item, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16, INT8
    )  # fmt: skip
