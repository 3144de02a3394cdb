# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""RMS normalisation for Numba: a work item is a block of rows. Imported only to compile."""

from statespan.ops.numba_kernels.gates import fast_sigmoid, silu_slope
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    broadcast,
    horizontal_sum,
    jit,
    load_any,
    square_root,
    store_any,
    zeros,
)


@jit
def inverse_rms(square, count, eps):
    """1 / sqrt(mean square + eps) from the vector of partial sums."""
    return 1.0 / square_root(broadcast(horizontal_sum(square) / count + eps))


def forward(
    item, worker, x, residual, weight, y, total, num_rows, rows_per_item, channels, x_stride, residual_stride, x_bf16,
    residual_bf16, weight_bf16, y_bf16, eps,
):  # fmt: skip
    """y = rms_norm(x); where residual is given, total = x + residual is written and normalised instead."""
    for row in range(item * rows_per_item, min(num_rows, (item + 1) * rows_per_item)):
        source, start, source_bf16 = x, row * x_stride, x_bf16
        if residual != 0:
            for c in range(0, channels, WIDTH):
                h = load_any(x, row * x_stride + c, channels - c, x_bf16)
                h = h + load_any(residual, row * residual_stride + c, channels - c, residual_bf16)
                store_any(total, row * channels + c, h, channels - c, residual_bf16)
            source, start, source_bf16 = total, row * channels, residual_bf16

        square = zeros()
        for c in range(0, channels, WIDTH):
            h = load_any(source, start + c, channels - c, source_bf16)
            square = square + h * h
        scale = inverse_rms(square, channels, eps)
        for c in range(0, channels, WIDTH):
            h = load_any(source, start + c, channels - c, source_bf16)
            w = load_any(weight, c, channels - c, weight_bf16)
            store_any(y, row * channels + c, h * scale * w, channels - c, y_bf16)


def backward(
    item, worker, grad_y, grad_total, x, weight, grad_x, grad_weight, num_rows, rows_per_item, channels, grad_y_stride,
    grad_total_stride, x_stride, grad_y_bf16, grad_total_bf16, x_bf16, weight_bf16, eps,
):  # fmt: skip
    """grad_x (of x, plus grad_total where given) and this item's part of grad_weight [items channels] in float32."""
    for c in range(0, channels, WIDTH):
        store_any(grad_weight, item * channels + c, zeros(), channels - c, 0)
    for row in range(item * rows_per_item, min(num_rows, (item + 1) * rows_per_item)):
        square, product = zeros(), zeros()
        for c in range(0, channels, WIDTH):
            h = load_any(x, row * x_stride + c, channels - c, x_bf16)
            g = load_any(grad_y, row * grad_y_stride + c, channels - c, grad_y_bf16)
            square = square + h * h
            product = product + h * g * load_any(weight, c, channels - c, weight_bf16)
        scale = inverse_rms(square, channels, eps)
        shrink = scale * scale * (horizontal_sum(product) / channels)
        for c in range(0, channels, WIDTH):
            count = channels - c
            g = load_any(grad_y, row * grad_y_stride + c, count, grad_y_bf16)
            unit = load_any(x, row * x_stride + c, count, x_bf16) * scale
            part = load_any(grad_weight, item * channels + c, count, 0)
            store_any(grad_weight, item * channels + c, g * unit + part, count, 0)
            g = g * load_any(weight, c, count, weight_bf16) * scale - unit * shrink
            if grad_total != 0:
                g = g + load_any(grad_total, row * grad_total_stride + c, count, grad_total_bf16)
            store_any(grad_x, row * channels + c, g, count, x_bf16)


def gated_forward(
    item, worker, x, z, weight, y, scratch, num_rows, rows_per_item, channels, group_size, norm_before_gate, x_stride,
    z_stride, scratch_stride, x_bf16, z_bf16, weight_bf16, eps,
):  # fmt: skip
    """y = rms_norm(x * silu(z)) by groups, or rms_norm(x) * silu(z)."""
    product = scratch + worker * scratch_stride  # one group of x * silu(z)
    for row in range(item * rows_per_item, min(num_rows, (item + 1) * rows_per_item)):
        for number in range(channels // group_size):
            group = number * group_size
            square = zeros()
            for c in range(0, group_size, WIDTH):
                h = load_any(x, row * x_stride + group + c, group_size - c, x_bf16)
                gate = load_any(z, row * z_stride + group + c, group_size - c, z_bf16)
                gated = h * (gate * fast_sigmoid(gate))
                store_any(product, c, gated, group_size - c, 0)
                if norm_before_gate == 0:
                    h = gated
                square = square + h * h
            scale = inverse_rms(square, group_size, eps)
            for c in range(0, group_size, WIDTH):
                h = load_any(product, c, group_size - c, 0) * scale
                h = h * load_any(weight, group + c, group_size - c, weight_bf16)
                store_any(y, row * channels + group + c, h, group_size - c, x_bf16)


def gated_backward(
    item, worker, grad_y, x, z, weight, grad_x, grad_z, grad_weight, scratch, num_rows, rows_per_item, channels,
    group_size, norm_before_gate, grad_y_stride, x_stride, z_stride, scratch_stride, x_bf16, z_bf16, weight_bf16, eps,
):  # fmt: skip
    """grad_x, grad_z and this item's part of grad_weight [items channels] in float32."""
    gates = scratch + worker * scratch_stride  # sigmoid(z) of one group
    for c in range(0, channels, WIDTH):
        store_any(grad_weight, item * channels + c, zeros(), channels - c, 0)
    for row in range(item * rows_per_item, min(num_rows, (item + 1) * rows_per_item)):
        for number in range(channels // group_size):
            group = number * group_size
            square, product = zeros(), zeros()
            for c in range(0, group_size, WIDTH):
                count = group_size - c
                h = load_any(x, row * x_stride + group + c, count, x_bf16)
                gate = load_any(z, row * z_stride + group + c, count, z_bf16)
                open_ = fast_sigmoid(gate)
                store_any(gates, c, open_, count, 0)
                gated = h * (gate * open_)
                g = load_any(grad_y, row * grad_y_stride + group + c, count, x_bf16)
                product = product + g * load_any(weight, group + c, count, weight_bf16) * gated
                if norm_before_gate == 0:
                    h = gated
                square = square + h * h
            scale = inverse_rms(square, group_size, eps)
            shrink = scale * scale * scale * (horizontal_sum(product) / group_size)
            for c in range(0, group_size, WIDTH):
                count, at = group_size - c, group + c
                h = load_any(x, row * x_stride + at, count, x_bf16)
                gate = load_any(z, row * z_stride + at, count, z_bf16)
                open_ = load_any(gates, c, count, 0)
                silu = gate * open_
                g = load_any(grad_y, row * grad_y_stride + at, count, x_bf16)
                part = load_any(grad_weight, item * channels + at, count, 0)
                store_any(grad_weight, item * channels + at, g * (h * silu) * scale + part, count, 0)

                g = g * load_any(weight, at, count, weight_bf16) * scale  # gradient of the normalised, gated x
                if norm_before_gate != 0:
                    grad_gate = g * h
                    g = g * silu - h * shrink
                else:
                    g = g - h * silu * shrink
                    grad_gate = g * h
                    g = g * silu
                store_any(grad_x, row * channels + at, g, count, x_bf16)
                grad_gate = grad_gate * silu_slope(gate, open_)
                store_any(grad_z, row * channels + at, grad_gate, count, z_bf16)
