# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RUF005  # its language has no starred tuples
"""The causal depthwise convolution in Triton: a program walks along a strip of tokens with a block of channels.

The newest inputs stay in registers as a tuple, so that each is read from memory once; a tuple of TAPS - 1 rows of
channels is what the reference calls the window. `source` is (x, its stride, initial_state, channels, mask).
"""

import triton
import triton.language as tl

from statespan.ops.triton_kernels.functions import both, sigmoid


@triton.jit
def _load_rows(start, stride, mask, COUNT: tl.constexpr):
    """A tuple of COUNT rows, `stride` apart, in float32."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(start + i * stride, mask, 0.0).to(tl.float32),)
    return found


@triton.jit
def load_tokens(x, t, stop, stride, mask, COUNT: tl.constexpr):
    """A tuple of the tokens t, t + 1, .., as they are in memory; zeros from `stop` on."""
    x += t.to(tl.int64) * stride  # once: a 64-bit product costs as much as the work on a value
    found = ()
    for u in tl.static_range(COUNT):
        found = found + (tl.load(x + u * stride, both(mask, t + u < stop), 0.0),)
    return found


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (value,)
    return found


@triton.jit
def select(condition, yes, no):
    """Element by element of two tuples."""
    found = ()
    for i in tl.static_range(len(yes)):
        found = found + (tl.where(condition, yes[i], no[i]),)
    return found


@triton.jit
def load_weights(weight, bias, column, weight_stride, tap_stride, mask, TAPS: tl.constexpr):
    """The taps of a block of channels, oldest first, and their bias."""
    offset = tl.zeros(column.shape, tl.float32)
    if bias is not None:
        offset += tl.load(bias + column, mask, 0.0).to(tl.float32)
    return _load_rows(weight + column * weight_stride, tap_stride, mask, TAPS), offset


@triton.jit
def load_input(source, t, history):
    """Row t of what the window slides over, in float32; rows -history to -1 are the initial state."""
    x, x_stride, initial_state, channels, mask = source
    value = tl.load(x + t.to(tl.int64) * x_stride, both(mask, t >= 0), 0.0).to(tl.float32)
    if initial_state is not None:
        initial = both(mask, (t < 0) & (t >= -history))
        value += tl.load(initial_state + (t + history) * channels, initial, 0.0).to(tl.float32)
    return value


@triton.jit
def combine(window, token, taps, offset):
    """offset + sum_i taps[i] window[i] + taps[-1] token."""
    total = offset + taps[len(window)] * token
    for i in tl.static_range(len(window)):
        total += taps[i] * window[i]
    return total


@triton.jit
def _last_real(segments, stop, SEARCH: tl.constexpr):
    """The last token before `stop` that is no padding, or -1."""
    found = stop * 0 - 1
    while (stop > 0) & (found < 0):
        place = stop - SEARCH + tl.arange(0, SEARCH)
        number = tl.load(segments + place, place >= 0, -1)
        found = tl.max(tl.where(number >= 0, place, -1), 0)
        stop -= SEARCH
    return found


@triton.jit
def next_real(segments, start, length, SEARCH: tl.constexpr):
    """The first token from `start` on that is no padding, or `length`."""
    found = length + start * 0
    while (start < length) & (found >= length):
        place = start + tl.arange(0, SEARCH)
        number = tl.load(segments + place, place < length, -1)
        found = tl.min(tl.where(number >= 0, place, length), 0)
        start += SEARCH
    return found


@triton.jit
def window_before(source, segments, start, HISTORY: tl.constexpr, SEARCH: tl.constexpr):
    """What the window holds when token `start` comes, and the segment's number, or -1 before the first real token."""
    t = _last_real(segments, start, SEARCH)
    current = tl.load(segments + t, t >= 0, -1).to(tl.int64)
    window = ()
    for _ in tl.static_range(HISTORY):
        window = (load_input(source, t, HISTORY),) + window
        before = tl.where(t >= 0, _last_real(segments, t, SEARCH), t - 1)
        # Beyond a restart there is nothing.
        t = tl.where(tl.load(segments + before, before >= 0, current).to(tl.int64) == current, before, -1 - HISTORY)
    return window, current


@triton.jit
def uniform(segments, start, stop, length, SPAN: tl.constexpr):
    """Whether tokens start to stop, as far as the row has them, are real and of one segment."""
    place = start + tl.arange(0, SPAN)
    here = (place >= 0) & (place >= start) & (place < stop) & (place < length)
    number = tl.load(segments + place, here, -1).to(tl.int64)
    first = tl.max(number, 0)
    return (first >= 0) & (tl.min(tl.where(here, number, first), 0) == first)


@triton.jit
def _emit(to, token, window, taps, offset, mask, SILU: tl.constexpr):
    """Write y of one token at `to`; the next window."""
    token = token.to(tl.float32)
    value = combine(window, token, taps, offset)
    if SILU:
        value *= sigmoid(value)
    tl.store(to, value.to(to.dtype.element_ty), mask)
    return (window + (token,))[1:]


@triton.jit
def _walk(source, y, final_state, start, length, strip, taps, offset, SILU: tl.constexpr, UNROLL: tl.constexpr):
    """The forward along a strip of one segment."""
    HISTORY: tl.constexpr = len(taps) - 1
    x, x_stride, _initial_state, channels, mask = source
    window = ()
    for i in tl.static_range(HISTORY):
        window = window + (load_input(source, start + i - HISTORY, HISTORY),)
    stop = tl.minimum(start + strip, length)
    t = start
    tokens = load_tokens(x, t, stop, x_stride, mask, UNROLL)
    for _ in range(0, (stop - start) // UNROLL):
        ahead = load_tokens(x, t + UNROLL, stop, x_stride, mask, UNROLL)
        to = y + t.to(tl.int64) * channels
        for u in tl.static_range(UNROLL):
            window = _emit(to + u * channels, tokens[u], window, taps, offset, mask, SILU)
        tokens = ahead
        t += UNROLL
    for _ in range(0, stop - t):
        token = tl.load(x + t.to(tl.int64) * x_stride, mask, 0.0)
        window = _emit(y + t.to(tl.int64) * channels, token, window, taps, offset, mask, SILU)
        t += 1
    for i in tl.static_range(HISTORY):
        value = load_input(source, tl.cast(length + i - HISTORY, tl.int32), HISTORY).to(final_state.dtype.element_ty)
        tl.store(final_state + i * channels, value, both(mask, start + strip >= length))


@triton.jit
def _walk_segments(
    source, y, final_state, segments, start, length, strip, taps, offset, SILU: tl.constexpr, SEARCH: tl.constexpr
):
    """The forward along any strip."""
    x, x_stride, _initial_state, channels, mask = source
    window, current = window_before(source, segments, start, len(taps) - 1, SEARCH)
    stop = tl.minimum(start + strip, length)
    t = start
    ahead = tl.load(x + t.to(tl.int64) * x_stride, mask, 0.0)
    number_ahead = tl.load(segments + t).to(tl.int64)
    for _ in range(0, stop - start):
        token, number = ahead.to(tl.float32), number_ahead
        more = t + 1 < stop
        ahead = tl.load(x + (t + 1).to(tl.int64) * x_stride, both(mask, more), 0.0)
        number_ahead = tl.load(segments + t + 1, more, -1).to(tl.int64)
        real = number >= 0
        restarts = real & (current >= 0) & (number != current)
        current = tl.where(real, number, current)
        window = select(restarts, repeat(token * 0.0, len(window)), window)
        value = combine(window, token, taps, offset)
        if SILU:
            value *= sigmoid(value)
        value = tl.where(real, value, 0.0)
        tl.store(y + t.to(tl.int64) * channels, value.to(y.dtype.element_ty), mask)
        window = select(real, (window + (token,))[1:], window)
        t += 1
    for i in tl.static_range(len(window)):
        value = window[i].to(final_state.dtype.element_ty)
        tl.store(final_state + i * channels, value, both(mask, start + strip >= length))


@triton.jit(do_not_specialize=["length", "strips", "strip"])
def forward(
    x,
    weight,
    bias,
    initial_state,
    segments,
    y,
    final_state,
    length,
    channels,
    strips,
    strip,
    x_batch_stride,
    x_stride,
    weight_stride,
    tap_stride,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """y and the final state; a program has one strip of one row and BLOCK channels."""
    HISTORY: tl.constexpr = TAPS - 1
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0) // blocks
    batch, start = (program // strips).to(tl.int64), (program % strips) * strip
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < channels
    y += batch * length * channels + column
    final_state += batch * HISTORY * channels + column
    if initial_state is not None:
        initial_state += batch * HISTORY * channels + column
    source = (x + batch * x_batch_stride + column, x_stride, initial_state, channels, mask)
    taps, offset = load_weights(weight, bias, column, weight_stride, tap_stride, mask, TAPS)

    if segments is None:
        _walk(source, y, final_state, start, length, strip, taps, offset, SILU, UNROLL)
    else:
        segments += batch * length
        if uniform(segments, start - HISTORY, start + strip, length, SPAN):
            _walk(source, y, final_state, start, length, strip, taps, offset, SILU, UNROLL)
        else:
            _walk_segments(source, y, final_state, segments, start, length, strip, taps, offset, SILU, SEARCH)


@triton.jit
def update(
    state,
    x,
    weight,
    bias,
    y,
    next_state,
    channels,
    x_stride,
    weight_stride,
    tap_stride,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: y and the next window."""
    HISTORY: tl.constexpr = TAPS - 1
    blocks = tl.cdiv(channels, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < channels
    token = tl.load(x + batch * x_stride + column, mask, 0.0)
    window = _load_rows(state + batch * HISTORY * channels + column, channels, mask, HISTORY)
    taps, offset = load_weights(weight, bias, column, weight_stride, tap_stride, mask, TAPS)
    value = combine(window, token.to(tl.float32), taps, offset)
    if SILU:
        value *= sigmoid(value)
    tl.store(y + batch * channels + column, value.to(y.dtype.element_ty), mask)
    after = (window + (token.to(tl.float32),))[1:]
    for i in tl.static_range(HISTORY):
        to = next_state + (batch * HISTORY + i) * channels + column
        tl.store(to, after[i].to(next_state.dtype.element_ty), mask)
