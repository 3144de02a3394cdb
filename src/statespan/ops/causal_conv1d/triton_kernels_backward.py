# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RUF005  # its language has no starred tuples
"""Gradients of the causal depthwise convolution in Triton, along the strips of `triton_kernels.py`.

Beside the window go the unfinished gradients of its tokens: each is complete, and written, when the token leaves the
window.
"""

import triton
import triton.language as tl

from statespan.ops.causal_conv1d.triton_kernels import (
    combine,
    load_input,
    load_tokens,
    load_weights,
    next_real,
    repeat,
    select,
    uniform,
    window_before,
)
from statespan.ops.triton_kernels.functions import both, sigmoid, silu_slope


@triton.jit
def _finish(value, place, to, write):
    """Write the gradient of row `place` at `to` if it is one of the strip's.

    Rows below 0 are those of the initial state, which the first strip writes.
    """
    grad_initial_state, start, stop, channels, mask, history, _stride = write
    inside = (place >= start) & (place < stop)
    tl.store(to, value.to(to.dtype.element_ty), both(mask, inside))
    if grad_initial_state is not None:
        initial = (place < 0) & (place >= -history) & (start == 0)
        to = grad_initial_state + (place + history) * channels
        tl.store(to, value.to(to.dtype.element_ty), both(mask, initial))


@triton.jit
def _finish_at(value, place, grad_x, write):
    """`_finish` of a row that can be anywhere."""
    _finish(value, place, grad_x + place.to(tl.int64) * write[6], write)


@triton.jit
def _slope_of(grad, window, token, taps, offset, SILU: tl.constexpr):
    """The gradient before the activation."""
    if SILU:
        value = combine(window, token, taps, offset)
        grad *= silu_slope(value, sigmoid(value))
    return grad


@triton.jit
def _add_taps(pending, grad, taps):
    """The unfinished gradients of the window's tokens and of the token itself, grad_t taps added."""
    found = ()
    for i in tl.static_range(len(pending)):
        found = found + (pending[i] + grad * taps[i],)
    return found + (grad * taps[len(pending)],)


@triton.jit
def _add_products(sums, grad, window, token):
    """The taps' gradients with grad_t window added."""
    found = ()
    for i in tl.static_range(len(window)):
        found = found + (sums[i] + grad * window[i],)
    return found + (sums[len(window)] + grad * token,)


@triton.jit
def _segment_step(
    token,
    grad,
    number,
    t,
    window,
    pending,
    places,
    current,
    sums,
    bias_sum,
    taps,
    offset,
    own,
    grad_x,
    write,
    SILU: tl.constexpr,
):
    """One token of the backward with segments.

    places: the rows of the window's tokens, below -HISTORY where there is none. grad_x, write: as `_finish_at` takes
    them. own: whether the token counts in the sums.
    """
    none = t * 0 - 1 - len(window)
    real = number >= 0
    token = tl.where(real, token, 0.0)  # padding may hold NaN
    restarts = real & (current >= 0) & (number != current)
    current = tl.where(real, number, current)
    for i in tl.static_range(len(window)):
        _finish_at(pending[i], tl.where(restarts, places[i], none), grad_x, write)
    window = select(restarts, repeat(token * 0.0, len(window)), window)
    pending = select(restarts, repeat(token * 0.0, len(window)), pending)
    places = select(restarts, repeat(none, len(window)), places)

    grad = tl.where(real, _slope_of(grad, window, token, taps, offset, SILU), 0.0)
    full = _add_taps(pending, grad, taps)
    chain = places + (t,)
    _finish_at(full[0], tl.where(real, chain[0], none), grad_x, write)
    counted = tl.where(own, grad, 0.0)
    sums = _add_products(sums, counted, window, token)
    pending = select(real, full[1:], pending)
    places = select(real, chain[1:], places)
    window = select(real, (window + (token,))[1:], window)
    return window, pending, places, current, sums, bias_sum + counted


@triton.jit
def _store_sums(parts, sums, bias_sum, channels, mask):
    for i in tl.static_range(len(sums)):
        tl.store(parts + i * channels, sums[i], mask)
    tl.store(parts + len(sums) * channels, bias_sum, mask)


@triton.jit
def _walk_back(
    source, upstream, grad_x, write, parts, start, stop, length, taps, offset, SILU: tl.constexpr, UNROLL: tl.constexpr
):
    """The backward along a strip of one segment; the name is the gradients', the walk goes forward."""
    HISTORY: tl.constexpr = len(taps) - 1
    grad_y, grad_y_stride, grad_final_state = upstream
    x, x_stride, _initial_state, channels, mask = source
    zeros = offset * 0.0
    window = ()
    for i in tl.static_range(HISTORY):
        window = window + (load_input(source, start + i - HISTORY, HISTORY),)
    pending = repeat(zeros, HISTORY)
    sums = repeat(zeros, len(taps))
    bias_sum = zeros
    t = start
    tokens = load_tokens(x, t, stop, x_stride, mask, UNROLL)
    grads = load_tokens(grad_y, t, stop, grad_y_stride, mask, UNROLL)
    for _ in range(0, (stop - start) // UNROLL):
        tokens_ahead = load_tokens(x, t + UNROLL, stop, x_stride, mask, UNROLL)
        grads_ahead = load_tokens(grad_y, t + UNROLL, stop, grad_y_stride, mask, UNROLL)
        to = grad_x + (t - HISTORY).to(tl.int64) * write[6]
        for u in tl.static_range(UNROLL):
            token = tokens[u].to(tl.float32)
            grad = _slope_of(grads[u].to(tl.float32), window, token, taps, offset, SILU)
            sums = _add_products(sums, grad, window, token)
            bias_sum += grad
            full = _add_taps(pending, grad, taps)
            _finish(full[0], t + u - HISTORY, to + u * write[6], write)
            pending = full[1:]
            window = (window + (token,))[1:]
        tokens, grads = tokens_ahead, grads_ahead
        t += UNROLL
    # What is left of the strip, then the tokens after it, which complete its gradients. A place that the final state
    # holds is among the strip's last, so its gradient from there is added here.
    for _ in range(0, stop + HISTORY - t):
        token = tl.load(x + t.to(tl.int64) * x_stride, both(mask, t < length), 0.0).to(tl.float32)
        grad = tl.load(grad_y + t.to(tl.int64) * grad_y_stride, both(mask, t < length), 0.0).to(tl.float32)
        grad = _slope_of(grad, window, token, taps, offset, SILU)
        own = tl.where(t < stop, grad, 0.0)
        sums = _add_products(sums, own, window, token)
        bias_sum += own
        full = _add_taps(pending, grad, taps)
        final = t - length
        last = tl.load(grad_final_state + final * channels, both(mask, (final >= 0) & (final < HISTORY)), 0.0)
        _finish_at(full[0] + last.to(tl.float32), t - HISTORY, grad_x, write)
        pending = full[1:]
        window = (window + (token,))[1:]
        t += 1
    _store_sums(parts, sums, bias_sum, channels, mask)


@triton.jit
def _walk_back_segments(
    source,
    upstream,
    grad_x,
    write,
    parts,
    segments,
    start,
    stop,
    length,
    taps,
    offset,
    SILU: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """The backward along any strip, and on to the real tokens that complete it."""
    HISTORY: tl.constexpr = len(taps) - 1
    grad_y, grad_y_stride, grad_final_state = upstream
    x, x_stride, _initial_state, channels, mask = source
    zeros = offset * 0.0
    window, current = window_before(source, segments, start, HISTORY, SEARCH)
    pending = repeat(zeros, HISTORY)
    sums = repeat(zeros, len(taps))
    bias_sum = zeros
    places = ()
    for i in tl.static_range(HISTORY):
        places = places + (tl.where(start == 0, i - HISTORY, -1 - HISTORY),)
    t = start
    token_ahead = tl.load(x + t.to(tl.int64) * x_stride, mask, 0.0)
    grad_ahead = tl.load(grad_y + t.to(tl.int64) * grad_y_stride, mask, 0.0)
    number_ahead = tl.load(segments + t).to(tl.int64)
    for _ in range(0, stop - start):
        token, grad, number = token_ahead.to(tl.float32), grad_ahead.to(tl.float32), number_ahead
        more = t + 1 < stop
        token_ahead = tl.load(x + (t + 1).to(tl.int64) * x_stride, both(mask, more), 0.0)
        grad_ahead = tl.load(grad_y + (t + 1).to(tl.int64) * grad_y_stride, both(mask, more), 0.0)
        number_ahead = tl.load(segments + t + 1, more, -1).to(tl.int64)
        padding = both(mask, number < 0)
        tl.store(grad_x + t.to(tl.int64) * write[6], zeros.to(grad_x.dtype.element_ty), padding)
        window, pending, places, current, sums, bias_sum = _segment_step(
            token, grad, number, t, window, pending, places, current, sums, bias_sum, taps, offset, t >= 0,
            grad_x, write, SILU,
        )  # fmt: skip
        t += 1
    t -= 1
    for _ in range(HISTORY):  # the real tokens that complete the strip's
        t = next_real(segments, t + 1, length, SEARCH)
        number = tl.load(segments + t, t < length, -1).to(tl.int64)
        token = tl.load(x + t.to(tl.int64) * x_stride, both(mask, t < length), 0.0).to(tl.float32)
        grad = tl.load(grad_y + t.to(tl.int64) * grad_y_stride, both(mask, t < length), 0.0).to(tl.float32)
        window, pending, places, current, sums, bias_sum = _segment_step(
            token, grad, number, t, window, pending, places, current, sums, bias_sum, taps, offset, t < 0,
            grad_x, write, SILU,
        )  # fmt: skip
    for i in tl.static_range(HISTORY):  # where the row's end was met, the window is the final state
        last = tl.load(grad_final_state + i * channels, mask, 0.0).to(tl.float32)
        _finish_at(pending[i] + last, tl.where(t >= length, places[i], -1 - HISTORY), grad_x, write)
    _store_sums(parts, sums, bias_sum, channels, mask)


@triton.jit(do_not_specialize=["length", "strips", "strip"])
def backward(
    grad_y,
    grad_final_state,
    x,
    weight,
    bias,
    initial_state,
    segments,
    grad_x,
    parts,
    grad_initial_state,
    length,
    channels,
    strips,
    strip,
    grad_y_batch_stride,
    grad_y_stride,
    x_batch_stride,
    x_stride,
    grad_x_batch_stride,
    grad_x_stride,
    weight_stride,
    tap_stride,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Gradients of x and the initial state, and each strip's part of [weight's taps, bias], in float32."""
    HISTORY: tl.constexpr = TAPS - 1
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0) // blocks
    batch, start = (program // strips).to(tl.int64), (program % strips) * strip
    stop = tl.minimum(start + strip, length)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < channels
    if initial_state is not None:
        initial_state += batch * HISTORY * channels + column
        grad_initial_state += batch * HISTORY * channels + column
    source = (x + batch * x_batch_stride + column, x_stride, initial_state, channels, mask)
    grad_final_state += batch * HISTORY * channels + column
    upstream = (grad_y + batch * grad_y_batch_stride + column, grad_y_stride, grad_final_state)
    grad_x += batch * grad_x_batch_stride + column
    write = (grad_initial_state, start, stop, channels, mask, HISTORY, grad_x_stride)
    parts += program.to(tl.int64) * (TAPS + 1) * channels + column
    taps, offset = load_weights(weight, bias, column, weight_stride, tap_stride, mask, TAPS)

    if segments is None:
        _walk_back(source, upstream, grad_x, write, parts, start, stop, length, taps, offset, SILU, UNROLL)
    else:
        segments += batch * length
        if uniform(segments, start - HISTORY, stop + HISTORY, length, SPAN):
            _walk_back(source, upstream, grad_x, write, parts, start, stop, length, taps, offset, SILU, UNROLL)
        else:
            _walk_back_segments(
                source, upstream, grad_x, write, parts, segments, start, stop, length, taps, offset, SILU, SEARCH
            )
