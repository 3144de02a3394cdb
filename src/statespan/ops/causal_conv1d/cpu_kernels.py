# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""The causal depthwise convolution for Numba. Imported only to compile.

A work item is one batch row of one block of channels. It walks through time with a window: the addresses of the rows of
the newest k - 1 inputs of the segment, oldest first, then of the tokens in hand. Padding does not enter the window, and
where a segment ends its entries are made to point to a row of zeros. Four tokens of a segment are taken at once where
they stand together, so that each weight and input is loaded less often; otherwise one.
"""

from statespan.ops.causal_conv1d.cpu import AT_ONCE
from statespan.ops.numba_kernels.gates import fast_sigmoid, fast_silu, silu_slope
from statespan.ops.numba_kernels.loads import load_strided, load_strided_bf16, store_int64
from statespan.ops.numba_kernels.vector import WIDTH, broadcast, jit, load_any, load_int64, store_any, zeros


@jit
def _clear(address, count, bf16):
    """Write zeros to a row."""
    for c in range(0, count, WIDTH):
        store_any(address, c, zeros(), count - c, bf16)


@jit
def _fill(entries, first, last, value):
    """Set the entries first .. last - 1."""
    for i in range(first, last):
        store_int64(entries, i, value)


@jit
def _drop(entries, count, taps):
    """Let the oldest `count` entries go; k - 1 remain."""
    for i in range(taps - 1):
        store_int64(entries, i, load_int64(entries, i + count))


@jit
def _tokens_at_once(segments, at, remaining, current):
    """AT_ONCE where the next tokens all belong to the current segment, else 1."""
    if remaining < AT_ONCE:
        return 1
    if segments != 0:
        for i in range(AT_ONCE):
            if load_int64(segments, at + i) != current:
                return 1
    return AT_ONCE


@jit
def _convolve(window, weight, start, c, count, taps, channels, bf16):
    """start + the sum over k rows from the window's first entry on, at one vector of channels. weight is [k d]."""
    h = start
    for i in range(taps):
        h = load_any(load_int64(window, i), c, count, bf16) * load_any(weight, i * channels + c, count, 0) + h
    return h


@jit
def _convolve_4(window, weight, start, c, count, taps, channels, bf16):
    """`_convolve` from each of the window's first four entries."""
    h0, h1, h2, h3 = start, start, start, start
    for i in range(taps):
        w = load_any(weight, i * channels + c, count, 0)
        h0 = load_any(load_int64(window, i), c, count, bf16) * w + h0
        h1 = load_any(load_int64(window, i + 1), c, count, bf16) * w + h1
        h2 = load_any(load_int64(window, i + 2), c, count, bf16) * w + h2
        h3 = load_any(load_int64(window, i + 3), c, count, bf16) * w + h3
    return h0, h1, h2, h3


@jit
def _bias_vector(bias, c, count):
    if bias != 0:
        return load_any(bias, c, count, 0)
    return zeros()


@jit
def _forward_vector(window, weight, bias, target, c, count, tokens, taps, channels, bf16, silu):
    """y of 1 or 4 tokens at one vector of channels."""
    start = _bias_vector(bias, c, count)
    if tokens == 1:
        h0 = _convolve(window, weight, start, c, count, taps, channels, bf16)
        if silu != 0:
            h0 = fast_silu(h0)
        store_any(target, c, h0, count, bf16)
    else:
        h0, h1, h2, h3 = _convolve_4(window, weight, start, c, count, taps, channels, bf16)
        if silu != 0:
            h0, h1, h2, h3 = fast_silu(h0), fast_silu(h1), fast_silu(h2), fast_silu(h3)
        store_any(target, c, h0, count, bf16)
        store_any(target, channels + c, h1, count, bf16)
        store_any(target, 2 * channels + c, h2, count, bf16)
        store_any(target, 3 * channels + c, h3, count, bf16)


@jit
def _forward(
    item, worker, x, weight, bias, initial_state, zero_row, segments, y, final_state, windows, length, channels, taps,
    block, x_batch_stride, x_stride, silu, bf16,
):  # fmt: skip
    num_blocks = (channels + block - 1) // block
    batch, first = item // num_blocks, item % num_blocks * block
    width, size = min(block, channels - first), 4 - 2 * bf16
    full = width // WIDTH * WIDTH
    window = windows + worker * (taps + 2 * AT_ONCE) * 8
    weight = weight + first * 4
    if bias != 0:
        bias = bias + first * 4
    state_row = (batch * (taps - 1) * channels + first) * size
    _fill(window, 0, taps - 1, zero_row)
    if initial_state != 0:
        for i in range(taps - 1):
            store_int64(window, i, initial_state + state_row + i * channels * size)

    current, t = -1, 0
    while t < length:
        target = y + ((batch * length + t) * channels + first) * size
        if segments != 0:
            segment = load_int64(segments, batch * length + t)
            if segment < 0:
                _clear(target, width, bf16)
                t += 1
                continue
            if current >= 0 and segment != current:
                _fill(window, 0, taps - 1, zero_row)
            current = segment
        tokens = _tokens_at_once(segments, batch * length + t, length - t, current)
        for i in range(tokens):
            source = x + (batch * x_batch_stride + (t + i) * x_stride + first) * size
            store_int64(window, taps - 1 + i, source)
        for c in range(0, full, WIDTH):
            _forward_vector(window, weight, bias, target, c, WIDTH, tokens, taps, channels, bf16, silu)
        if full < width:
            _forward_vector(window, weight, bias, target, full, width - full, tokens, taps, channels, bf16, silu)
        _drop(window, tokens, taps)
        t += tokens

    for i in range(taps - 1):
        target = final_state + state_row + i * channels * size
        for c in range(0, width, WIDTH):
            store_any(target, c, load_any(load_int64(window, i), c, width - c, bf16), width - c, bf16)


def forward(
    item, worker, x, weight, bias, initial_state, zero_row, segments, y, final_state, windows, length, channels, taps,
    block, x_batch_stride, x_stride, silu, bf16,
):  # fmt: skip
    """y and the final state."""
    if bf16 != 0:  # constants from here on, so that the innermost loops have no branches
        _forward(
            item, worker, x, weight, bias, initial_state, zero_row, segments, y, final_state, windows, length,
            channels, taps, block, x_batch_stride, x_stride, silu, 1,
        )  # fmt: skip
    else:
        _forward(
            item, worker, x, weight, bias, initial_state, zero_row, segments, y, final_state, windows, length,
            channels, taps, block, x_batch_stride, x_stride, silu, 0,
        )  # fmt: skip


@jit
def _slope(h, silu):
    if silu != 0:
        return silu_slope(h, fast_sigmoid(h))
    return broadcast(1.0)


@jit
def _accumulate(address, index, value, count):
    store_any(address, index, load_any(address, index, count, 0) + value, count, 0)


@jit
def _write_gradient(targets, entry, c, value, count, bf16):
    """To the entry's row of grad_x or grad_initial_state; nowhere where the entry is no input (0)."""
    target = load_int64(targets, entry)
    if target != 0:
        store_any(target, c, value, count, bf16)


@jit
def _backward_vector(
    window, slopes, targets, upstream, upstream_stride, weight, mirrored, bias, grad_weight, grad_bias, c, count,
    tokens, taps, channels, silu, bf16,
):  # fmt: skip
    """The gradients that 1 or 4 tokens bring, at one vector of channels.

    `slopes` are the addresses of float32 rows for the gradients of the sums, before SiLU, that end at each entry of the
    window. Those of the tokens in hand are written; with them the oldest 1 or 4 inputs have met all sums they enter.
    """
    start = _bias_vector(bias, c, count)
    if tokens == 1:
        h = _convolve(window, weight, start, c, count, taps, channels, bf16)
        g = load_any(upstream, c, count, bf16) * _slope(h, silu)
        store_any(load_int64(slopes, taps - 1), c, g, count, 0)
        _accumulate(grad_bias, c, g, count)
        for i in range(taps):
            _accumulate(grad_weight, i * channels + c, load_any(load_int64(window, i), c, count, bf16) * g, count)
        grad = _convolve(slopes, mirrored, zeros(), c, count, taps, channels, 0)
        _write_gradient(targets, 0, c, grad, count, bf16)
    else:
        h0, h1, h2, h3 = _convolve_4(window, weight, start, c, count, taps, channels, bf16)
        g0 = load_any(upstream, c, count, bf16) * _slope(h0, silu)
        g1 = load_any(upstream, upstream_stride + c, count, bf16) * _slope(h1, silu)
        g2 = load_any(upstream, 2 * upstream_stride + c, count, bf16) * _slope(h2, silu)
        g3 = load_any(upstream, 3 * upstream_stride + c, count, bf16) * _slope(h3, silu)
        store_any(load_int64(slopes, taps - 1), c, g0, count, 0)
        store_any(load_int64(slopes, taps), c, g1, count, 0)
        store_any(load_int64(slopes, taps + 1), c, g2, count, 0)
        store_any(load_int64(slopes, taps + 2), c, g3, count, 0)
        _accumulate(grad_bias, c, (g0 + g1) + (g2 + g3), count)
        for i in range(taps):
            part = load_any(load_int64(window, i), c, count, bf16) * g0
            part = load_any(load_int64(window, i + 1), c, count, bf16) * g1 + part
            part = load_any(load_int64(window, i + 2), c, count, bf16) * g2 + part
            part = load_any(load_int64(window, i + 3), c, count, bf16) * g3 + part
            _accumulate(grad_weight, i * channels + c, part, count)
        d0, d1, d2, d3 = _convolve_4(slopes, mirrored, zeros(), c, count, taps, channels, 0)
        _write_gradient(targets, 0, c, d0, count, bf16)
        _write_gradient(targets, 1, c, d1, count, bf16)
        _write_gradient(targets, 2, c, d2, count, bf16)
        _write_gradient(targets, 3, c, d3, count, bf16)


@jit
def _finish(slopes, targets, mirrored, zero_row, grad_final_state, width, taps, channels, bf16):
    """Write the gradients of the inputs that remain in the window where a segment or the row ends."""
    _fill(slopes, taps - 1, 2 * taps - 2, zero_row)
    for entry in range(taps - 1):
        for c in range(0, width, WIDTH):
            grad = _convolve(slopes + 8 * entry, mirrored, zeros(), c, width - c, taps, channels, 0)
            if grad_final_state != 0:
                grad = grad + load_any(grad_final_state, entry * channels + c, width - c, bf16)
            _write_gradient(targets, entry, c, grad, width - c, bf16)


@jit
def _backward(
    item, worker, grad_y, grad_final_state, x, weight, mirrored, bias, initial_state, zero_row, segments, grad_x,
    grad_weight, grad_bias, grad_initial_state, windows, slope_rows, length, channels, taps, block, grad_batch_stride,
    grad_stride, x_batch_stride, x_stride, silu, bf16,
):  # fmt: skip
    num_blocks = (channels + block - 1) // block
    batch, first = item // num_blocks, item % num_blocks * block
    width, size = min(block, channels - first), 4 - 2 * bf16
    full = width // WIDTH * WIDTH
    entries = 2 * taps + AT_ONCE
    window = windows + worker * (3 * entries + 8) * 8
    slopes, targets = window + entries * 8, window + 2 * entries * 8
    num_slope_rows = taps - 1 + AT_ONCE
    slope_rows = slope_rows + worker * num_slope_rows * block * 4
    weight, mirrored = weight + first * 4, mirrored + first * 4
    if bias != 0:
        bias = bias + first * 4
    grad_weight = grad_weight + (batch * taps * channels + first) * 4
    grad_bias = grad_bias + (batch * channels + first) * 4
    state_row = (batch * (taps - 1) * channels + first) * size

    _clear(grad_bias, width, 0)
    for i in range(taps):
        _clear(grad_weight + i * channels * 4, width, 0)
    _fill(window, 0, taps - 1, zero_row)
    _fill(slopes, 0, taps - 1, zero_row)
    _fill(targets, 0, taps - 1, 0)
    if initial_state != 0:
        for i in range(taps - 1):
            store_int64(window, i, initial_state + state_row + i * channels * size)
            store_int64(targets, i, grad_initial_state + state_row + i * channels * size)

    current, t, seen = -1, 0, 0
    while t < length:
        target = grad_x + ((batch * length + t) * channels + first) * size
        if segments != 0:
            segment = load_int64(segments, batch * length + t)
            if segment < 0:
                _clear(target, width, bf16)
                t += 1
                continue
            if current >= 0 and segment != current:
                _finish(slopes, targets, mirrored, zero_row, 0, width, taps, channels, bf16)
                _fill(window, 0, taps - 1, zero_row)
                _fill(slopes, 0, taps - 1, zero_row)
                _fill(targets, 0, taps - 1, 0)
            current = segment
        tokens = _tokens_at_once(segments, batch * length + t, length - t, current)
        for i in range(tokens):
            source = x + (batch * x_batch_stride + (t + i) * x_stride + first) * size
            store_int64(window, taps - 1 + i, source)
            store_int64(slopes, taps - 1 + i, slope_rows + (seen + i) % num_slope_rows * block * 4)
            store_int64(targets, taps - 1 + i, target + i * channels * size)
        upstream = grad_y + (batch * grad_batch_stride + t * grad_stride + first) * size
        for c in range(0, full, WIDTH):
            _backward_vector(
                window, slopes, targets, upstream, grad_stride, weight, mirrored, bias, grad_weight, grad_bias, c,
                WIDTH, tokens, taps, channels, silu, bf16,
            )  # fmt: skip
        if full < width:
            _backward_vector(
                window, slopes, targets, upstream, grad_stride, weight, mirrored, bias, grad_weight, grad_bias, full,
                width - full, tokens, taps, channels, silu, bf16,
            )  # fmt: skip
        _drop(window, tokens, taps)
        _drop(slopes, tokens, taps)
        _drop(targets, tokens, taps)
        t, seen = t + tokens, seen + tokens
    _finish(slopes, targets, mirrored, zero_row, grad_final_state + state_row, width, taps, channels, bf16)


def backward(
    item, worker, grad_y, grad_final_state, x, weight, mirrored, bias, initial_state, zero_row, segments, grad_x,
    grad_weight, grad_bias, grad_initial_state, windows, slope_rows, length, channels, taps, block, grad_batch_stride,
    grad_stride, x_batch_stride, x_stride, silu, bf16,
):  # fmt: skip
    """Gradients; grad_weight [b k d] and grad_bias [b d] are float32 sums over this batch row.

    Beside the window of inputs go one of slopes (see `_backward_vector`) and one of targets (where an input's gradient
    is written when it leaves the window). mirrored is the weight with its taps in reverse order.
    """
    if bf16 != 0:  # constants from here on, so that the innermost loops have no branches
        _backward(
            item, worker, grad_y, grad_final_state, x, weight, mirrored, bias, initial_state, zero_row, segments,
            grad_x, grad_weight, grad_bias, grad_initial_state, windows, slope_rows, length, channels, taps, block,
            grad_batch_stride, grad_stride, x_batch_stride, x_stride, silu, 1,
        )  # fmt: skip
    else:
        _backward(
            item, worker, grad_y, grad_final_state, x, weight, mirrored, bias, initial_state, zero_row, segments,
            grad_x, grad_weight, grad_bias, grad_initial_state, windows, slope_rows, length, channels, taps, block,
            grad_batch_stride, grad_stride, x_batch_stride, x_stride, silu, 0,
        )  # fmt: skip


@jit
def _weight_vector(weight, tap, c, count, taps, bf16):
    """weight[c : c + count, tap] of weight [d k] as it is."""
    if bf16 != 0:
        return load_strided_bf16(weight, c * taps + tap, taps, count)
    return load_strided(weight, c * taps + tap, taps, count)


@jit
def convolve_channels(
    first, last, state, x, weight, bias, y, next_state, channels, taps, state_bf16, x_bf16, weight_bf16, silu
):
    """One token of the channels first .. last - 1 of one batch row, at whose rows the addresses are."""
    for c in range(first, last, WIDTH):
        count = min(last - c, WIDTH)
        h = zeros()
        if bias != 0:
            h = load_any(bias, c, count, weight_bf16)
        for i in range(taps - 1):
            value = load_any(state, i * channels + c, count, state_bf16)
            h = value * _weight_vector(weight, i, c, count, taps, weight_bf16) + h
            if i > 0:
                store_any(next_state, (i - 1) * channels + c, value, count, state_bf16)
        value = load_any(x, c, count, x_bf16)
        h = value * _weight_vector(weight, taps - 1, c, count, taps, weight_bf16) + h
        if taps > 1:
            store_any(next_state, (taps - 2) * channels + c, value, count, state_bf16)
        if silu != 0:
            h = fast_silu(h)
        store_any(y, c, h, count, x_bf16)


def update(item, worker, state, x, weight, bias, y, next_state, channels, taps, x_stride, bf16, weight_bf16, silu):
    """One token of batch row `item`; weight [d k] as it is."""
    size = 4 - 2 * bf16
    row = item * (taps - 1) * channels * size
    convolve_channels(
        0, channels, state + row, x + item * x_stride * size, weight, bias, y + item * channels * size,
        next_state + row, channels, taps, bf16, bf16, weight_bf16, silu,
    )  # fmt: skip
