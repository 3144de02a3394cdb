# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505  # without the else, Triton compiles what follows a return too
"""Gradients of the chunked SSD in Triton; names and layouts are those of `triton_kernels.py`.

`gradients` knows the state before each chunk and the gradient of the state after it, so that chunks are independent.
For each token and lane it leaves sums, and one of the chunk, which `steps_backward` turns into the gradient of dt:

    0: the gradient of the token's decay from pairs of tokens inside the chunk
    1: from reading the state before the chunk; it belongs to the decays up to and with the token's
    2: from entering the state after the chunk; it belongs to the decays after the token's
    3: the gradient of scale
    4: the gradient of D, where it is [h]
    across: from the state that crosses the chunk; it belongs to all its decays
"""

import triton
import triton.language as tl

from statespan.ops.ssd.triton_kernels import (
    TINY,
    input_weight,
    load_tile,
    skip_factor,
    step_sizes,
    store_tile,
    tokens_inside,
)
from statespan.ops.triton_kernels.functions import sigmoid


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit(do_not_specialize=["length", "chunks", "heads", "group_heads", "share"])
def gradients(
    grad_y,
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
    grad_ends,
    grad_x,
    grad_scores,
    grad_D,
    sums,
    grad_across,
    length,
    chunks,
    heads,
    group_heads,
    share,
    grad_y_batch_stride,
    grad_y_stride,
    grad_y_head_stride,
    x_batch_stride,
    x_stride,
    x_head_stride,
    B_batch_stride,
    B_stride,
    B_group_stride,
    C_batch_stride,
    C_stride,
    C_group_stride,
    grad_x_batch_stride,
    grad_x_stride,
    grad_x_head_stride,
    D_stride,
    D_dim_stride,
    SKIP_DIMS: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of one group, `share` of its lanes one after the other: grad_x, and the gradient of B C^T.

    Pairs of tokens are [source target].
    """
    blocks: tl.constexpr = DIMS // BLOCK_P
    groups = heads // group_heads
    group, chunk = tl.program_id(0) % groups, tl.program_id(0) // groups % chunks
    batch = (tl.program_id(0) // groups // chunks).to(tl.int64)
    begin = chunk.to(tl.int64) * CHUNK
    q, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + n[None]
    if marks is not None:
        marks += batch * length
    there, real = tokens_inside(chunk, q, length, marks, CHUNK)
    grad_y += batch * grad_y_batch_stride + begin * grad_y_stride
    x += batch * x_batch_stride + begin * x_stride
    grad_x += batch * grad_x_batch_stride + begin * grad_x_stride
    B += batch * B_batch_stride + begin * B_stride + group * B_group_stride
    C += batch * C_batch_stride + begin * C_stride + group * C_group_stride
    keys = load_tile(B, B_stride, q, real, n)
    queries = load_tile(C, C_stride, q, real, n)
    # Sums over the tokens from s on, as a product; float16 has too small a range for them.
    NARROW: tl.constexpr = tl.bfloat16 if keys.dtype == tl.bfloat16 else tl.float32
    from_here = (q[:, None] >= q[None]).to(NARROW)
    grad_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    volume = tl.num_programs(0).to(tl.int64) * group_heads * blocks * CHUNK
    first = tl.program_id(1) * share
    for r in range(first, tl.minimum(first + share, group_heads * blocks)):
        head, p = group * group_heads + r // blocks, r % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        lane = (batch * heads + head) * blocks + r % blocks
        here = ((batch * heads + head) * chunks + chunk) * CHUNK
        sum_, factor = tl.load(total + here + q), tl.load(scale + here + q)
        if low is not None:
            rest = tl.load(low + here + q)
        values = load_tile(x + head * x_head_stride, x_stride, q, real, p)
        grads = grad_y + head * grad_y_head_stride
        to = sums + (lane * chunks + chunk) * CHUNK
        grad = load_tile(grads, grad_y_stride, q, real, p)
        if sign is not None:
            grad = (grad * tl.load(sign + here + q)[:, None]).to(values.dtype)
        gaps = sum_[None] - sum_[:, None]
        if low is not None:
            gaps += rest[None] - rest[:, None]
        decay = tl.exp2(tl.where(q[:, None] <= q[None], gaps, float("-inf")))
        # Computed anew for each lane: there are no registers to keep the scores in.
        matrix = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * decay
        source = tl.dot(matrix.to(values.dtype), grad, input_precision=PRECISION)
        products = tl.dot(values, tl.trans(grad), input_precision=PRECISION) * factor[:, None]
        grad_pairs += products * decay
        # A step's decay is in the pairs on both sides of it. Summing these and no others keeps the gradient of a
        # strong decay exact.
        pairs = products * matrix
        rounded = pairs.to(NARROW)
        if keys.dtype == tl.bfloat16:  # an error here would count for every step between the two tokens
            later = tl.dot((pairs - rounded.to(tl.float32)).to(NARROW), from_here)
            later = tl.dot(rounded, from_here, later)
        else:
            later = tl.dot(rounded, from_here, input_precision=PRECISION)
        tl.store(to + q, tl.sum(tl.where(q[:, None] < q[None], later, 0.0), 0))

        # What the state before the chunk and the gradient after it add.
        slot = (lane * chunks + chunk) * (BLOCK_P * BLOCK_N) + tile
        state, grad_state = tl.load(starts + slot), tl.load(grad_ends + slot)
        end = tl.load(total + here + CHUNK - 1)
        across = tl.exp2(end) * tl.sum(state.to(tl.float32) * grad_state.to(tl.float32))
        tl.store(grad_across + lane * chunks + chunk, across)
        gap = end - sum_
        if low is not None:
            gap += tl.load(low + here + CHUNK - 1) - rest
        pulled = tl.dot(keys, tl.trans(grad_state), input_precision=PRECISION) * tl.exp2(gap)[:, None]
        wide = load_tile(x + head * x_head_stride, x_stride, q, real, p).to(tl.float32)
        source += pulled
        # Two sums in one reduction: for one alone Triton rearranges the tile first.
        entering, grad_scale = tl.reduce((wide * (pulled * factor[:, None]), wide * source), 1, _add_pairs)
        read = tl.dot(queries, tl.trans(state), input_precision=PRECISION) * tl.exp2(sum_)[:, None]
        straight = load_tile(grads, grad_y_stride, q, real, p).to(tl.float32)
        reading, skipped = tl.reduce((straight * read, straight * wide), 1, _add_pairs)
        if sign is not None:
            turned = tl.load(sign + here + q)
            reading, grad_scale = reading * turned, grad_scale * turned
        tl.store(to + volume + q, reading)
        tl.store(to + 2 * volume + q, entering)
        tl.store(to + 3 * volume + q, grad_scale)
        out = source * factor[:, None]
        if D is not None:
            out += skip_factor(D + head * D_stride, D_dim_stride, p, SKIP_DIMS) * straight
            if SKIP_DIMS:
                place = ((batch * chunks + chunk) * heads + head) * DIMS + p
                tl.store(grad_D + place, tl.sum(wide * straight, 0))
            else:
                tl.store(to + 4 * volume + q, skipped)
        store_tile(grad_x + head * grad_x_head_stride, grad_x_stride, q, there, p, out)

    grad_scores += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (CHUNK * CHUNK)
    tl.store(grad_scores + q[:, None] * CHUNK + q[None], grad_pairs.to(grad_scores.dtype.element_ty))


@triton.jit(do_not_specialize=["length", "chunks", "scores_parts", "heads", "group_heads", "share"])
def gradients_of_columns(
    x,
    C,
    marks,
    total,
    low,
    scale,
    sign,
    grad_ends,
    grad_scores,
    grad_B,
    length,
    chunks,
    scores_parts,
    heads,
    group_heads,
    share,
    x_batch_stride,
    x_stride,
    x_head_stride,
    C_batch_stride,
    C_stride,
    C_group_stride,
    grad_B_part_stride,
    grad_B_batch_stride,
    grad_B_stride,
    grad_B_group_stride,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of B in a chunk of one group: from the pairs, and `share` lanes' inputs into the state.

    REVERSE is the same for C: x is then grad_y, C is B, and grad_ends has the states before each chunk.
    """
    blocks: tl.constexpr = DIMS // BLOCK_P
    groups = heads // group_heads
    group, chunk = tl.program_id(0) % groups, tl.program_id(0) // groups % chunks
    batch = (tl.program_id(0) // groups // chunks).to(tl.int64)
    begin = chunk.to(tl.int64) * CHUNK
    q, n = tl.arange(0, CHUNK), tl.program_id(2) * PART_N + tl.arange(0, PART_N)
    tile = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + n[None]
    if marks is not None:
        marks += batch * length
    there, real = tokens_inside(chunk, q, length, marks, CHUNK)
    x += batch * x_batch_stride + begin * x_stride
    found = tl.zeros((CHUNK, PART_N), tl.float32)
    first = tl.program_id(1) * share
    for r in range(first, tl.minimum(first + share, group_heads * blocks)):
        head, p = group * group_heads + r // blocks, r % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        lane = (batch * heads + head) * blocks + r % blocks
        here = ((batch * heads + head) * chunks + chunk) * CHUNK
        values = load_tile(x + head * x_head_stride, x_stride, q, real, p)
        state = tl.load(grad_ends + (lane * chunks + chunk) * (BLOCK_P * BLOCK_N) + tile)
        weight = input_weight(total, low, scale, sign, here, q, REVERSE, CHUNK)
        found = tl.dot((values * weight[:, None]).to(values.dtype), state, found, input_precision=PRECISION)
    if tl.program_id(1) == 0:
        others = C + batch * C_batch_stride + begin * C_stride + group * C_group_stride
        others = load_tile(others, C_stride, q, real, n)
        for part in range(scores_parts):
            matrix = (part * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * (CHUNK * CHUNK)
            pairs = tl.load(grad_scores + matrix + q[:, None] * CHUNK + q[None])
            if REVERSE:
                pairs = tl.trans(pairs)
            found = tl.dot(pairs, others, found, input_precision=PRECISION)
    place = grad_B + tl.program_id(1).to(tl.int64) * grad_B_part_stride + batch * grad_B_batch_stride
    place += begin * grad_B_stride + group * grad_B_group_stride
    store_tile(place, grad_B_stride, q, there, n, found)


@triton.jit
def _sums(base, here, inside, BLOCKS: tl.constexpr, STRIDE):
    """A sum over the blocks of places of each head."""
    found = tl.load(base + here, inside, 0.0)
    for block in tl.static_range(1, BLOCKS):
        found += tl.load(base + here + block * STRIDE, inside, 0.0)
    return found


@triton.jit
def _slopes(size, rate, DISCRETIZATION: tl.constexpr):
    """Derivatives of log decay by dt A, and of scale by dt and by A."""
    step = size * rate
    if DISCRETIZATION == "mamba":
        return step * 0.0 + 1.0, step * 0.0 + 1.0, step * 0.0
    elif DISCRETIZATION == "zoh":
        # (step exp(step) - exp(step) + 1) / step^2, by its series near 0
        series = step * 0.0
        factorial = 1.0
        for k in tl.static_range(14):
            factorial *= 1.0 / (k + 1)
        for k in tl.static_range(12, -1, -1):
            series = series * step + (k + 1) * factorial
            factorial *= k + 2
        small = tl.abs(step) < 1.0
        grown = tl.exp(step)
        far = (step * grown - grown + 1.0) / tl.where(small, 1.0, step * step)
        return step * 0.0 + 1.0, grown, size * size * tl.where(small, series, far)
    else:
        inverse = 1.0 / (1.0 - step / 2.0)
        exact = size.to(tl.float64) * rate.to(tl.float64)  # as `steps` has it: near a decay of zero all digits count
        decay = (1.0 + exact / 2.0) / (1.0 - exact / 2.0)
        slope = inverse * inverse / tl.where(decay == 0.0, TINY, decay).to(tl.float32)
        return slope, inverse * inverse, size * size / 2.0 * inverse * inverse


@triton.jit(
    do_not_specialize=["length", "heads", "dt_batch_stride", "dt_stride", "grad_dt_batch_stride", "grad_dt_stride"]
)
def steps_backward(
    sums,
    grad_across,
    dt,
    A,
    dt_bias,
    marks,
    grad_dt,
    grad_A,
    grad_bias,
    grad_D,
    length,
    heads,
    dt_batch_stride,
    dt_stride,
    dt_min,
    dt_max,
    grad_dt_batch_stride,
    grad_dt_stride,
    DT_SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The gradient of dt in a chunk, and the chunk's part of those of A and dt_bias."""
    chunks = tl.cdiv(length, CHUNK)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    q = tl.arange(0, CHUNK)
    time = tl.program_id(0) % chunks * CHUNK + q
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (time < length)[:, None] & (head < heads)[None]
    if marks is not None:
        marks += batch * length
    raw, size, limited, real = step_sizes(
        dt + batch * dt_batch_stride, dt_bias, marks, time, head, inside, dt_stride, dt_min, dt_max, DT_SOFTPLUS
    )
    rate = tl.load(A + head[None], (head < heads)[None], 0.0).to(tl.float32)

    padded = chunks * CHUNK
    volume = tl.num_programs(0).to(tl.int64) * CHUNK * heads * BLOCKS
    here = (batch * heads + head[None]) * BLOCKS * padded + time[:, None]
    decay = _sums(sums, here, inside, BLOCKS, padded)
    decay += tl.cumsum(_sums(sums + volume, here, inside, BLOCKS, padded), 0, reverse=True)
    # A token's own input does not see its decay. The sum of those before it, never a difference.
    decay += tl.cumsum(_sums(sums + 2 * volume - 1, here, inside & (q > 0)[:, None], BLOCKS, padded), 0)
    lane = (batch * heads + head[None]) * BLOCKS * chunks + tl.program_id(0) % chunks
    decay += _sums(grad_across, lane, (head < heads)[None], BLOCKS, chunks)
    grad_scale = _sums(sums + 3 * volume, here, inside, BLOCKS, padded)

    by_step, by_size, by_rate = _slopes(limited, rate, DISCRETIZATION)
    grad_step = decay * by_step
    grad = grad_step * rate + grad_scale * by_size
    grad_rate = tl.where(real, grad_step * limited + grad_scale * by_rate, 0.0)
    grad = tl.where(real & (size >= dt_min) & (size <= dt_max), grad, 0.0)
    if DT_SOFTPLUS:
        grad *= sigmoid(raw)
    to = grad_dt + batch * grad_dt_batch_stride + time[:, None].to(tl.int64) * grad_dt_stride + head[None]
    tl.store(to, grad.to(grad_dt.dtype.element_ty), inside)
    place = tl.program_id(0).to(tl.int64) * heads + head
    tl.store(grad_A + place, tl.sum(grad_rate, 0), head < heads)
    tl.store(grad_bias + place, tl.sum(grad, 0), head < heads)
    if grad_D is not None:
        straight = _sums(sums + 4 * volume, here, inside, BLOCKS, padded)
        tl.store(grad_D + place, tl.sum(straight, 0), head < heads)
