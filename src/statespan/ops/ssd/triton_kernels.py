# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505  # without the else, Triton compiles what follows a return too
"""The chunked SSD in Triton: steps, states and outputs; docs/kernels_triton.md has the design.

A lane is BLOCK_P places of one head in one row of the batch, with all their states: [BLOCK_P, BLOCK_N], powers of two
that heads and states fill (`triton_plan.padded`). Vectors of a head are [b h padded], padded being whole chunks of
time; tokens beyond the length have decay 1 and scale 0.

    total: log2 of the product of decays from the chunk's start up to and with the token. A restart is a decay of zero.
    low: what float32 leaves of total, for float32 inputs.
    scale: the factor of the token's input, times the sign of the product of decays ("bilinear" has negative ones).
    sign: the sign alone. With scale and y carrying it, all else sees positive decays.
"""

import triton
import triton.language as tl

from statespan.ops.segments import PADDING as _PADDING
from statespan.ops.segments import RESTARTS as _RESTARTS
from statespan.ops.triton_kernels.functions import mean_decay, softplus

PADDING: tl.constexpr = tl.constexpr(_PADDING)
RESTARTS: tl.constexpr = tl.constexpr(_RESTARTS)
# log2 of a decay that is zero in float32. Stronger ones change nothing but the precision of the sums.
ZERO: tl.constexpr = tl.constexpr(-200.0)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
TINY: tl.constexpr = tl.constexpr(1e-20)  # stands for a decay of exactly zero where its logarithm is taken


@triton.jit
def step_sizes(dt, dt_bias, marks, time, head, inside, dt_stride, dt_min, dt_max, DT_SOFTPLUS: tl.constexpr):
    """Before softplus, after it, after the limits, [time head]; and whether the token is real."""
    raw = tl.load(dt + time[:, None].to(tl.int64) * dt_stride + head[None], inside, 0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head[None], inside, 0.0).to(tl.float32)
    size = raw
    if DT_SOFTPLUS:
        size = softplus(raw)
    limited = tl.maximum(size, dt_min, propagate_nan=tl.PropagateNan.ALL)
    limited = tl.minimum(limited, dt_max, propagate_nan=tl.PropagateNan.ALL)
    real = inside
    if marks is not None:
        real &= tl.load(marks + time[:, None], inside, 0) != PADDING
    return raw, size, tl.where(real, limited, 0.0), real


@triton.jit(do_not_specialize=["length", "heads", "dt_batch_stride", "dt_stride"])
def steps(
    dt,
    A,
    dt_bias,
    marks,
    total,
    low,
    scale,
    sign,
    length,
    heads,
    dt_batch_stride,
    dt_stride,
    dt_min,
    dt_max,
    DT_SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The vectors of a chunk of tokens and HEADS heads; sums in float64."""
    chunks = tl.cdiv(length, CHUNK)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    time = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (time < length)[:, None] & (head < heads)[None]
    if marks is not None:
        marks += batch * length
    _, _, size, _ = step_sizes(
        dt + batch * dt_batch_stride, dt_bias, marks, time, head, inside, dt_stride, dt_min, dt_max, DT_SOFTPLUS
    )
    rate = tl.load(A + head[None], (head < heads)[None], 0.0).to(tl.float32)
    step = size.to(tl.float64) * rate.to(tl.float64)
    factor = size
    if DISCRETIZATION == "bilinear":
        decay = (1.0 + step / 2.0) / (1.0 - step / 2.0)
        log_decay = tl.log(tl.where(decay == 0.0, TINY, tl.abs(decay)))
        factor = size / (1.0 - size * rate / 2.0)
        below = tl.cumsum((decay < 0.0).to(tl.int32), 0)
        signs = (1 - 2 * (below & 1)).to(tl.float32)
        factor *= signs
    else:
        log_decay = step
        if DISCRETIZATION == "zoh":
            factor = size * mean_decay(size * rate)
    log_decay = tl.maximum(log_decay * LOG2_E, ZERO, propagate_nan=tl.PropagateNan.ALL)
    if marks is not None:
        log_decay = tl.where(tl.load(marks + time[:, None], inside, 0) == RESTARTS, ZERO, log_decay)
    sums = tl.cumsum(log_decay, 0)
    high = sums.to(tl.float32)
    place = (batch * heads + head[None]) * (chunks * CHUNK) + time[:, None]
    mask = (time < chunks * CHUNK)[:, None] & (head < heads)[None]
    tl.store(total + place, high, mask)
    tl.store(scale + place, factor, mask)
    if low is not None:
        tl.store(low + place, (sums - high.to(tl.float64)).to(tl.float32), mask)
    if sign is not None:
        tl.store(sign + place, signs, mask)


@triton.jit
def load_tile(base, stride, q, inside, column):
    """Tokens q from `base` on, [q column], zero where not inside."""
    return tl.load(base + q[:, None] * stride + column[None], inside[:, None], 0.0)


@triton.jit
def store_tile(base, stride, q, inside, column, value):
    """The reverse of `load_tile`, in the dtype of the pointer."""
    tl.store(base + q[:, None] * stride + column[None], value.to(base.dtype.element_ty), inside[:, None])


@triton.jit
def skip_factor(D, stride, p, SKIP_DIMS: tl.constexpr):
    """A head's D: one number, or [1 p] where SKIP_DIMS."""
    if SKIP_DIMS:
        return tl.load(D + p[None] * stride).to(tl.float32)
    else:
        return tl.load(D).to(tl.float32)


@triton.jit
def tokens_inside(chunk, q, length, marks, CHUNK: tl.constexpr):
    """Whether the chunk's token is there, and whether it is there and no padding."""
    time = chunk * CHUNK + q
    there = time < length
    real = there
    if marks is not None:
        real = there & (tl.load(marks + time, there, PADDING) != PADDING)
    return there, real


@triton.jit
def input_weight(total, low, scale, sign, here, q, REVERSE: tl.constexpr, CHUNK: tl.constexpr):
    """What the chunk's tokens are multiplied with on their way into the state after it.

    REVERSE: the gradients of y on their way into the gradient of the state before it.
    """
    sums = tl.load(total + here + q)
    if REVERSE:
        weight = tl.exp2(sums)
        if sign is not None:
            weight *= tl.load(sign + here + q)
        return weight
    else:
        gap = tl.load(total + here + CHUNK - 1) - sums
        if low is not None:
            gap += tl.load(low + here + CHUNK - 1) - tl.load(low + here + q)
        return tl.load(scale + here + q) * tl.exp2(gap)


@triton.jit(do_not_specialize=["length", "chunks", "split", "heads", "group_heads"])
def states(
    x,
    B,
    marks,
    total,
    low,
    scale,
    sign,
    starts,
    kept,
    ends,
    decays,
    length,
    chunks,
    split,
    heads,
    group_heads,
    x_batch_stride,
    x_stride,
    x_head_stride,
    B_batch_stride,
    B_stride,
    B_group_stride,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state through a split of `split` chunks: after them (ends), before each (kept), and the split's decay.

    REVERSE is the same for the gradient of the state, from the last chunk to the first: x is then grad_y, B is C, and
    kept holds the gradient after each chunk. A program has PART_N of the states.
    """
    blocks: tl.constexpr = DIMS // BLOCK_P
    lane, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block, head, batch = lane % blocks, lane // blocks % heads, lane // blocks // heads
    q, p, n = tl.arange(0, CHUNK), block.to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, PART_N)
    n += tl.program_id(2) * PART_N
    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + n[None]
    x += batch * x_batch_stride + head * x_head_stride
    B += batch * B_batch_stride + head // group_heads * B_group_stride
    row = (batch * heads + head) * chunks * CHUNK
    if marks is not None:
        marks += batch * length
    state = tl.zeros((BLOCK_P, PART_N), tl.float32)
    if starts is not None:
        state = tl.load(starts + (lane * parts + part) * (BLOCK_P * BLOCK_N) + tile)
    decay = 1.0
    first = part * split
    count = tl.minimum(split, chunks - first)
    for k in range(count):
        chunk = first + k
        if REVERSE:
            chunk = first + count - 1 - k
        begin = chunk.to(tl.int64) * CHUNK
        here = row + begin
        _, real = tokens_inside(chunk, q, length, marks, CHUNK)
        values = load_tile(x + begin * x_stride, x_stride, q, real, p)
        keys = load_tile(B + begin * B_stride, B_stride, q, real, n)
        weight = input_weight(total, low, scale, sign, here, q, REVERSE, CHUNK)
        end = tl.load(total + here + CHUNK - 1)
        if sign is not None:
            last = tl.load(sign + here + CHUNK - 1)
            decay *= last
            if REVERSE:
                state *= last
        if kept is not None:
            tl.store(kept + (lane * chunks + chunk) * (BLOCK_P * BLOCK_N) + tile, state.to(kept.dtype.element_ty))
        weighted = (values * weight[:, None]).to(values.dtype)
        state = tl.dot(tl.trans(weighted), keys, state * tl.exp2(end), input_precision=PRECISION)
        decay *= tl.exp2(end)
        if sign is not None and not REVERSE:
            state *= last
    if ends is not None:
        tl.store(ends + (lane * parts + part) * (BLOCK_P * BLOCK_N) + tile, state)
    if decays is not None and tl.program_id(2) == 0:
        tl.store(decays + lane * parts + part, decay)


@triton.jit(do_not_specialize=["parts"])
def chain(ends, decays, given, parts, REVERSE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Turns what each split makes of a zero state into the state that it starts from, in place."""
    lane = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros((BLOCK,), tl.float32)
    if given is not None:
        state = tl.load(given + lane * SIZE + place)
    for k in range(parts):
        part = k
        if REVERSE:
            part = parts - 1 - k
        slot = ends + (lane * parts + part) * SIZE + place
        local = tl.load(slot)
        tl.store(slot, state)
        state = state * tl.load(decays + lane * parts + part) + local


@triton.jit(do_not_specialize=["length", "chunks", "split", "heads", "group_heads"])
def outputs(
    x,
    B,
    C,
    D,
    marks,
    total,
    low,
    scale,
    sign,
    starts,
    y,
    final_state,
    length,
    chunks,
    split,
    heads,
    group_heads,
    x_batch_stride,
    x_stride,
    x_head_stride,
    B_batch_stride,
    B_stride,
    B_group_stride,
    C_batch_stride,
    C_stride,
    C_group_stride,
    D_stride,
    D_dim_stride,
    SKIP_DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y of a split of `split` chunks, one after the other with the state in registers."""
    blocks: tl.constexpr = DIMS // BLOCK_P
    lane, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    block, head, batch = lane % blocks, lane // blocks % heads, lane // blocks // heads
    q, p, n = tl.arange(0, CHUNK), block.to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + n[None]
    visible = q[:, None] >= q[None]
    x += batch * x_batch_stride + head * x_head_stride
    B += batch * B_batch_stride + head // group_heads * B_group_stride
    C += batch * C_batch_stride + head // group_heads * C_group_stride
    y += (batch * length * heads + head) * DIMS
    row = (batch * heads + head) * chunks * CHUNK
    if marks is not None:
        marks += batch * length
    if D is not None:
        skip = skip_factor(D + head * D_stride, D_dim_stride, p, SKIP_DIMS)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if starts is not None:
        state = tl.load(starts + (lane * parts + part) * (BLOCK_P * BLOCK_N) + tile)
    first = part * split
    for k in range(tl.minimum(split, chunks - first)):
        chunk = first + k
        begin = chunk.to(tl.int64) * CHUNK
        here = row + begin
        there, real = tokens_inside(chunk, q, length, marks, CHUNK)
        # Loads stand where they are needed: Triton fetches them a turn ahead, and into registers here.
        queries = load_tile(C + begin * C_stride, C_stride, q, real, n)
        sums = tl.load(total + here + q)
        out = tl.dot(queries, tl.trans(state.to(queries.dtype)), input_precision=PRECISION) * tl.exp2(sums)[:, None]
        keys = load_tile(B + begin * B_stride, B_stride, q, real, n)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        gaps = sums[:, None] - sums[None]
        if low is not None:
            rest = tl.load(low + here + q)
            gaps += rest[:, None] - rest[None]
        factor = tl.load(scale + here + q)
        matrix = scores * tl.exp2(tl.where(visible, gaps, float("-inf"))) * factor[None]
        values = load_tile(x + begin * x_stride, x_stride, q, real, p)
        out = tl.dot(matrix.to(values.dtype), values, out, input_precision=PRECISION)
        if sign is not None:
            out *= tl.load(sign + here + q)[:, None]
        if D is not None:
            out += skip * values.to(tl.float32)
        if marks is not None:
            out = tl.where(real[:, None], out, 0.0)
        store_tile(y + begin * heads * DIMS, heads * DIMS, q, there, p, out)
        end = tl.load(total + here + CHUNK - 1)
        weight = input_weight(total, low, scale, sign, here, q, False, CHUNK)
        weighted = (values * weight[:, None]).to(values.dtype)
        state = tl.dot(tl.trans(weighted), keys, state * tl.exp2(end), input_precision=PRECISION)
        if sign is not None:
            state *= tl.load(sign + here + CHUNK - 1)
    if part == parts - 1:
        tl.store(final_state + lane * (BLOCK_P * BLOCK_N) + tile, state)
