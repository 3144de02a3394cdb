# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""Matrix products that stream the weights once, for Numba. Imported only to compile.

A work item is a block of weight rows, read from the first to the last as one stream. The few rows of x are float32 and
stay in the cache.
"""

from statespan.ops.linear.cpu import BFLOAT16, FLOAT32, INT8
from statespan.ops.numba_kernels.loads import load_first_int8_as_float, load_int8_as_float, store_scalar_bf16
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    horizontal_sum,
    jit,
    jit_once,
    load,
    load_any,
    load_first,
    load_scalar,
    prefetch,
    store_scalar,
    zeros,
)

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
def _dots(row, next_row, x, x_stride, inputs, kind):
    """The products of two weight rows and four rows of x, so that each load is used more than once."""
    a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
    b0, b1, b2, b3 = zeros(), zeros(), zeros(), zeros()
    for i in range(0, inputs // WIDTH * WIDTH, WIDTH):
        _prefetch(row, i, WIDTH, kind)
        _prefetch(next_row, i, WIDTH, kind)
        u, v = _weights(row, i, kind), _weights(next_row, i, kind)
        x0, x1 = load(x, i), load(x, x_stride + i)
        x2, x3 = load(x, 2 * x_stride + i), load(x, 3 * x_stride + i)
        a0, a1, a2, a3 = u * x0 + a0, u * x1 + a1, u * x2 + a2, u * x3 + a3
        b0, b1, b2, b3 = v * x0 + b0, v * x1 + b1, v * x2 + b2, v * x3 + b3
    if inputs % WIDTH != 0:
        i, count = inputs // WIDTH * WIDTH, inputs % WIDTH
        u, v = _first_weights(row, i, count, kind), _first_weights(next_row, i, count, kind)
        x0, x1 = load_first(x, i, count), load_first(x, x_stride + i, count)
        x2, x3 = load_first(x, 2 * x_stride + i, count), load_first(x, 3 * x_stride + i, count)
        a0, a1, a2, a3 = u * x0 + a0, u * x1 + a1, u * x2 + a2, u * x3 + a3
        b0, b1, b2, b3 = v * x0 + b0, v * x1 + b1, v * x2 + b2, v * x3 + b3
    return a0, a1, a2, a3, b0, b1, b2, b3


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
def products(first, last, x, x_stride, rows, weight, row_stride, inputs, scale, bias, y, y_stride, y_bf16, kind):
    """y[:, first:last] = (x [rows inputs] W[first:last]^T) * scale + bias; x is float32, `kind` a constant."""
    o, step = first, row_stride * _bytes(kind)
    while o < last:
        row, pair, r = weight + o * step, min(2, last - o), 0
        while pair == 2 and r + 4 <= rows:
            sums = _dots(row, row + step, x + r * x_stride * 4, x_stride, inputs, kind)
            _finish(y, r * y_stride + o, horizontal_sum(sums[0]), o, scale, bias, y_bf16)
            _finish(y, (r + 1) * y_stride + o, horizontal_sum(sums[1]), o, scale, bias, y_bf16)
            _finish(y, (r + 2) * y_stride + o, horizontal_sum(sums[2]), o, scale, bias, y_bf16)
            _finish(y, (r + 3) * y_stride + o, horizontal_sum(sums[3]), o, scale, bias, y_bf16)
            _finish(y, r * y_stride + o + 1, horizontal_sum(sums[4]), o + 1, scale, bias, y_bf16)
            _finish(y, (r + 1) * y_stride + o + 1, horizontal_sum(sums[5]), o + 1, scale, bias, y_bf16)
            _finish(y, (r + 2) * y_stride + o + 1, horizontal_sum(sums[6]), o + 1, scale, bias, y_bf16)
            _finish(y, (r + 3) * y_stride + o + 1, horizontal_sum(sums[7]), o + 1, scale, bias, y_bf16)
            r += 4
        for i in range(pair):
            for left in range(r, rows):
                value = _dot(row + i * step, x + left * x_stride * 4, inputs, kind)
                _finish(y, left * y_stride + o + i, value, o + i, scale, bias, y_bf16)
        o += pair


@jit_once
def products_of(first, last, x, x_stride, rows, weight, row_stride, inputs, scale, bias, y, y_stride, y_bf16, kind):
    """`products` with any `kind`, for kernels that take several."""
    if kind == INT8:
        products(first, last, x, x_stride, rows, weight, row_stride, inputs, scale, bias, y, y_stride, y_bf16, INT8)
    elif kind == BFLOAT16:
        products(
            first, last, x, x_stride, rows, weight, row_stride, inputs, scale, bias, y, y_stride, y_bf16, BFLOAT16
        )  # fmt: skip
    else:
        products(first, last, x, x_stride, rows, weight, row_stride, inputs, scale, bias, y, y_stride, y_bf16, FLOAT32)


@jit
def _linear(item, x, weight, scale, bias, y, rows, inputs, outputs, outputs_per_item, row_stride, y_bf16, kind):
    first = item * outputs_per_item
    last = min(outputs, first + outputs_per_item)
    products(first, last, x, inputs, rows, weight, row_stride, inputs, scale, bias, y, outputs, y_bf16, kind)


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
