# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505, RUF005  # without the else, it compiles what follows an early return too; it has no starred tuples
"""The selective scan in Triton: a program walks along the tokens with a tile [channels, states] in registers.

The forward keeps the state before every EVERY-th token where asked; the backward goes back over these chunks, from the
last to the first: once on, with every state written to scratch memory, then back.
"""

import triton
import triton.language as tl

from statespan.ops.segments import PADDING, RESTARTS
from statespan.ops.triton_kernels.functions import both, mean_decay, sigmoid, silu_slope, softplus

IS_PADDING = tl.constexpr(PADDING)
IS_RESTART = tl.constexpr(RESTARTS)


@triton.jit
def _tokens(x, t, stop, stride, mask, COUNT: tl.constexpr):
    """A tuple of the tokens t, t + 1, .., as they are in memory; zeros from `stop` on."""
    x += t.to(tl.int64) * stride
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(x + i * stride, both(mask, t + i < stop), 0.0),)
    return found


@triton.jit
def _step_size(dt, bias, SOFTPLUS: tl.constexpr):
    dt = dt.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return dt


@triton.jit
def _discretize(dt, A, DISCRETIZATION: tl.constexpr):
    """Abar and the mean m by which dt m B is Bbar, of tiles."""
    step = dt[:, None] * A
    if DISCRETIZATION == "mamba":
        return tl.exp(step), step * 0.0 + 1.0
    elif DISCRETIZATION == "zoh":
        return tl.exp(step), mean_decay(step)
    else:
        tl.static_assert(DISCRETIZATION == "bilinear")
        mean = 1.0 / (1.0 - step / 2.0)
        return (1.0 + step / 2.0) * mean, mean


@triton.jit
def _slopes(dt, A, decay, mean, DISCRETIZATION: tl.constexpr):
    """The derivatives of Abar and m by dt A."""
    step = dt[:, None] * A
    if DISCRETIZATION == "mamba":
        return decay, step * 0.0
    elif DISCRETIZATION == "zoh":
        series = step * 0.0
        for k in tl.static_range(9, -1, -1):  # sum of (k + 1) / (k + 2)! step^k
            factorial = 1.0
            for i in tl.static_range(2, k + 3):
                factorial = factorial * i
            series = series * step + (k + 1.0) / factorial
        small = tl.abs(step) < 0.5
        return decay, tl.where(small, series, (decay - mean) / tl.where(small, 1.0, step))
    else:
        return mean * mean, mean * mean / 2.0


@triton.jit
def _mark(marks, t, stop):
    """What the token is: padding beyond the end."""
    if marks is not None:
        return tl.load(marks + t, t < stop, IS_PADDING)
    else:
        return tl.where(t < stop, 0, IS_PADDING)


@triton.jit
def _place(tile, group, group_channels, states, CHANNELS: tl.constexpr, STATES: tl.constexpr):
    """A tile's channels, which of them there are, its states, the tile's mask and its places in [d n]."""
    inside = tile * CHANNELS + tl.arange(0, CHANNELS)
    here = inside < group_channels
    channel = group * group_channels + inside
    n = tl.arange(0, STATES)
    return channel, here, n, here[:, None] & (n < states)[None], channel[:, None] * states + n[None]


@triton.jit
def _vector(x, channel, here):
    """Values of the channels in float32; zeros where there is no tensor."""
    value = tl.zeros(channel.shape, tl.float32)
    if x is not None:
        value += tl.load(x + channel, here, 0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["length"])
def forward(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    initial_state,
    marks,
    y,
    final_state,
    starts,
    length,
    channels,
    states,
    group_channels,
    u_batch_stride,
    u_stride,
    dt_batch_stride,
    dt_stride,
    B_batch_stride,
    B_stride,
    B_group_stride,
    C_batch_stride,
    C_stride,
    C_group_stride,
    z_batch_stride,
    z_stride,
    SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    EVERY: tl.constexpr,
    UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """y, the final state and, with EVERY > 0, the states before each EVERY-th token."""
    tiles = tl.cdiv(group_channels, CHANNELS)
    groups = channels // group_channels
    group = tl.program_id(0) // tiles % groups
    batch = (tl.program_id(0) // tiles // groups).to(tl.int64)
    channel, here, n, mask, place = _place(tl.program_id(0) % tiles, group, group_channels, states, CHANNELS, STATES)
    rate = tl.load(A + place, mask, 0.0)
    bias, skip = _vector(dt_bias, channel, here), _vector(D, channel, here)
    size = channels * states
    state = tl.zeros([CHANNELS, STATES], tl.float32)
    if initial_state is not None:
        state += tl.load(initial_state + batch * size + place, mask, 0.0)
    u += batch * u_batch_stride + channel
    dt += batch * dt_batch_stride + channel
    B += batch * B_batch_stride + group * B_group_stride + n
    C += batch * C_batch_stride + group * C_group_stride + n
    y += batch * length * channels + channel
    if z is not None:
        z += batch * z_batch_stride + channel
    if marks is not None:
        marks += batch * length
    if EVERY > 0:
        starts += batch * tl.cdiv(length, EVERY) * size + place

    t = length * 0
    for _ in range(0, tl.cdiv(length, UNROLL)):
        inputs = _tokens(u, t, length, u_stride, here, UNROLL)
        steps = _tokens(dt, t, length, dt_stride, here, UNROLL)
        entering = _tokens(B, t, length, B_stride, n < states, UNROLL)
        leaving = _tokens(C, t, length, C_stride, n < states, UNROLL)
        gates = inputs
        if z is not None:
            gates = _tokens(z, t, length, z_stride, here, UNROLL)
        if EVERY > 0:
            tl.store(starts + (t // EVERY).to(tl.int64) * size, state, both(mask, t % EVERY == 0))
        for i in tl.static_range(UNROLL):
            mark = _mark(marks, t + i, length)
            token, step = inputs[i].to(tl.float32), _step_size(steps[i], bias, SOFTPLUS)
            decay, mean = _discretize(step, rate, DISCRETIZATION)
            before = state
            if marks is not None:
                before = tl.where(mark == IS_RESTART, 0.0, state)
            after = decay * before + mean * (step * token)[:, None] * entering[i].to(tl.float32)[None]
            state = tl.where(mark == IS_PADDING, state, after)
            out = tl.sum(state * leaving[i].to(tl.float32)[None], 1) + skip * token
            if z is not None:
                gate = gates[i].to(tl.float32)
                out *= gate * sigmoid(gate)
            out = tl.where(mark == IS_PADDING, 0.0, out).to(y.dtype.element_ty)
            tl.store(y + (t + i).to(tl.int64) * channels, out, both(here, t + i < length))
        t += UNROLL
    tl.store(final_state + batch * size + place, state, mask)


@triton.jit
def _add_part(to, value, mask, first):
    """Write, or from the second tile on add, a tile's part of a sum over channels."""
    value += tl.load(to, both(mask, not first), 0.0)
    tl.store(to, value, mask)


@triton.jit(do_not_specialize=["length", "blocks"])
def backward(
    grad_y,
    grad_final_state,
    starts,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    marks,
    scratch,
    grad_u,
    grad_dt,
    grad_z,
    grad_A,
    grad_D,
    grad_bias,
    grad_initial_state,
    grad_B,
    grad_C,
    length,
    blocks,
    channels,
    states,
    group_channels,
    grad_y_batch_stride,
    grad_y_stride,
    u_batch_stride,
    u_stride,
    dt_batch_stride,
    dt_stride,
    B_batch_stride,
    B_stride,
    B_group_stride,
    C_batch_stride,
    C_stride,
    C_group_stride,
    z_batch_stride,
    z_stride,
    SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    EVERY: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """Gradients of all inputs; of A, D, dt_bias for each row, of B and C for each block of tiles, in float32.

    A program has every `blocks`-th tile of a group of channels of one row, one after the other.
    """
    groups = channels // group_channels
    block, group = tl.program_id(0) % blocks, tl.program_id(0) // blocks % groups
    batch = (tl.program_id(0) // blocks // groups).to(tl.int64)
    size, chunks = channels * states, tl.cdiv(length, EVERY)
    scratch += tl.program_id(0).to(tl.int64) * EVERY * CHANNELS * STATES
    scratch += tl.arange(0, CHANNELS)[:, None] * STATES + tl.arange(0, STATES)[None]
    B += batch * B_batch_stride + group * B_group_stride
    C += batch * C_batch_stride + group * C_group_stride
    parts = ((block * (tl.num_programs(0) // blocks // groups) + batch) * length * groups + group) * states
    if marks is not None:
        marks += batch * length

    for tile in range(block, tl.cdiv(group_channels, CHANNELS), blocks):
        channel, here, n, mask, place = _place(tile, group, group_channels, states, CHANNELS, STATES)
        rate = tl.load(A + place, mask, 0.0)
        bias, skip = _vector(dt_bias, channel, here), _vector(D, channel, here)
        carry = tl.zeros([CHANNELS, STATES], tl.float32)
        if grad_final_state is not None:
            carry += tl.load(grad_final_state + batch * size + place, mask, 0.0)
        sum_A = tl.zeros([CHANNELS, STATES], tl.float32)
        sum_D, sum_bias = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
        chunk = chunks
        for _ in range(0, chunks):
            chunk -= 1
            start, stop = chunk * EVERY, tl.minimum(chunk * EVERY + EVERY, length)
            t = start
            state = tl.load(starts + (batch * chunks + chunk) * size + place, mask, 0.0)
            for _ in range(0, stop - start):
                tl.store(scratch + (t - start) * (CHANNELS * STATES), state)
                row, mark = t.to(tl.int64), _mark(marks, t, stop)
                token = tl.load(u + batch * u_batch_stride + row * u_stride + channel, here, 0.0).to(tl.float32)
                step = tl.load(dt + batch * dt_batch_stride + row * dt_stride + channel, here, 0.0)
                step = _step_size(step, bias, SOFTPLUS)
                entering = tl.load(B + row * B_stride + n, n < states, 0.0).to(tl.float32)
                decay, mean = _discretize(step, rate, DISCRETIZATION)
                before = tl.where(mark == IS_RESTART, 0.0, state)
                after = decay * before + mean * (step * token)[:, None] * entering[None]
                state = tl.where(mark == IS_PADDING, state, after)
                t += 1
            tl.debug_barrier()
            for _ in range(0, stop - start):
                t -= 1
                row, mark = t.to(tl.int64), _mark(marks, t, stop)
                real = mark != IS_PADDING
                before = tl.load(scratch + (t - start) * (CHANNELS * STATES))
                before = tl.where(mark == IS_RESTART, 0.0, before)
                # What padding holds, which may be no number, is not even loaded.
                seen = both(here, real)
                token = tl.load(u + batch * u_batch_stride + row * u_stride + channel, seen, 0.0).to(tl.float32)
                raw = tl.load(dt + batch * dt_batch_stride + row * dt_stride + channel, seen, 0.0).to(tl.float32)
                step = _step_size(raw, bias, SOFTPLUS)
                entering = tl.load(B + row * B_stride + n, both(n < states, real), 0.0).to(tl.float32)
                leaving = tl.load(C + row * C_stride + n, both(n < states, real), 0.0).to(tl.float32)
                grad = tl.load(grad_y + batch * grad_y_batch_stride + row * grad_y_stride + channel, seen, 0.0)
                grad = grad.to(tl.float32)
                decay, mean = _discretize(step, rate, DISCRETIZATION)
                after = decay * before + mean * (step * token)[:, None] * entering[None]
                to = (batch * length + row) * channels + channel
                if z is not None:
                    gate = tl.load(z + batch * z_batch_stride + row * z_stride + channel, seen, 0.0).to(tl.float32)
                    opening = sigmoid(gate)
                    out = tl.sum(after * leaving[None], 1) + skip * token
                    grad_gate = grad * out * silu_slope(gate, opening)
                    tl.store(grad_z + to, grad_gate.to(grad_z.dtype.element_ty), here)
                    grad *= gate * opening
                sum_D += grad * token
                carry += grad[:, None] * leaving[None]
                scaled = carry * mean * entering[None]  # the gradient of dt u
                along = tl.sum(scaled, 1)
                tl.store(grad_u + to, (grad * skip + step * along).to(grad_u.dtype.element_ty), here)
                part = parts + row * groups * states + n
                of_C, of_B = tl.sum(grad[:, None] * after, 0), tl.sum(carry * mean * (step * token)[:, None], 0)
                _add_part(grad_C + part, tl.where(real, of_C, 0.0), n < states, tile == block)
                _add_part(grad_B + part, tl.where(real, of_B, 0.0), n < states, tile == block)

                decay_slope, mean_slope = _slopes(step, rate, decay, mean, DISCRETIZATION)
                of_mean = carry * (step * token)[:, None] * entering[None]
                of_step = tl.where(real, carry * before * decay_slope + of_mean * mean_slope, 0.0)
                sum_A += of_step * step[:, None]
                grad_step = token * along + tl.sum(of_step * rate, 1)
                if SOFTPLUS:
                    grad_step *= sigmoid(raw + bias)
                grad_step = tl.where(real, grad_step, 0.0)
                sum_bias += grad_step
                tl.store(grad_dt + to, grad_step.to(grad_dt.dtype.element_ty), here)
                carry = tl.where(real, tl.where(mark == IS_RESTART, 0.0, carry * decay), carry)
            tl.debug_barrier()
        tl.store(grad_initial_state + batch * size + place, carry, mask)
        tl.store(grad_A + batch * size + place, sum_A, mask)
        tl.store(grad_D + batch * channels + channel, sum_D, here)
        tl.store(grad_bias + batch * channels + channel, sum_bias, here)
