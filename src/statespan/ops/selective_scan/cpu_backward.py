# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""The backward kernel of the selective scan; `cpu.py` is its host side. Imported only to compile.

Chunks run from the last to the first. Each is computed again from the state before it, a tile of states at a time,
keeping states and decays; then the recurrence runs backward over it. A tile's scratch memory fits the first-level
cache.
"""

from typing import NamedTuple

from statespan.ops.numba_kernels.special_functions import sigmoid, softplus_and_sigmoid
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    absolute,
    broadcast,
    jit,
    load,
    load_scalar,
    prefetch,
    prefetch_to_write,
    store,
    store_any,
    sums_of_vectors,
    where_less,
    zeros,
)
from statespan.ops.segments import PADDING, RESTARTS
from statespan.ops.selective_scan.cpu import CHUNK, TILE_STATES
from statespan.ops.selective_scan.cpu_recurrence import (
    BYTES,
    LN_2,
    MAMBA,
    ZOH,
    Matrix,
    Rows,
    Tensor,
    address_of,
    advance,
    clear,
    discretize,
    get,
    load_columns,
    load_matrix,
    mark_of,
    optional,
    place_of,
    put,
    read,
    rows_of,
    store_columns,
    write,
)

TILE = TILE_STATES * BYTES
# Scratch arrays [chunk lanes]: dt, d dt / d raw dt, u, gradient of y before the gate, d silu(z) / dz times the
# gradient, y before the gate, gradients of u and of dt.
STEPS, SLOPES, INPUTS, GRADS, GATES, OUTPUTS, GRADS_U, GRADS_DT = range(8)
NUM_LINES = 8


class Streams(NamedTuple):
    """What a chunk reads and writes: the tensors, or the rows of one vector of channels in them."""

    u: Tensor | Rows
    dt: Tensor | Rows
    z: Tensor | Rows
    grad_y: Tensor | Rows
    grad_u: Tensor | Rows
    grad_dt: Tensor | Rows
    grad_z: Tensor | Rows


class Tile(NamedTuple):
    """Scratch addresses of TILE_STATES states of a vector of channels."""

    history: int  # [chunk+1 n lanes], states; entry t is before step t
    decays: int  # [chunk n lanes]
    nothing: int  # [n lanes], zeros
    rates: int  # [n lanes], A log2(e)
    carry: int  # [n lanes], gradient of the state between the steps
    sum_A: int  # [n lanes]
    sum_B: int  # [n lanes] of the first step, the others follow sum_stride bytes apart
    sum_C: int
    sum_stride: int
    B: int  # [n] of the first step, the others follow matrix_stride bytes apart
    C: int
    matrix_stride: int


@jit
def _prepare(lines, rows, bias, skip, dt_softplus, num_steps):
    """Everything about a token that does not depend on the states."""
    for t in range(num_steps):
        step, slope = read(rows.dt, t) + bias, broadcast(1.0)
        if dt_softplus != 0:
            step, slope = softplus_and_sigmoid(step)
        value, grad = read(rows.u, t), read(rows.grad_y, t)
        if rows.z.address != 0:
            gate = read(rows.z, t)
            opening = sigmoid(gate)
            put(lines, GATES, t, grad * opening * (gate * (1.0 - opening) + 1.0))
            grad = grad * gate * opening
        put(lines, STEPS, t, step)
        put(lines, SLOPES, t, slope)
        put(lines, INPUTS, t, value)
        put(lines, GRADS, t, grad)
        put(lines, OUTPUTS, t, skip * value)
        put(lines, GRADS_U, t, skip * grad)
        put(lines, GRADS_DT, t, zeros())


@jit
def _fetch(rows, t):
    """Ask for step t of the inputs of the chunk to come, which is the one before, and of this chunk's outputs."""
    prefetch(address_of(rows.u, t - CHUNK))
    prefetch(address_of(rows.dt, t - CHUNK))
    prefetch(address_of(rows.z, t - CHUNK))
    prefetch(address_of(rows.grad_y, t - CHUNK))
    prefetch_to_write(address_of(rows.grad_u, t))
    prefetch_to_write(address_of(rows.grad_dt, t))
    prefetch_to_write(address_of(rows.grad_z, t))


@jit
def _replay(lines, rows, tile, marks, first, discretization, num_steps):
    """The states and decays of a chunk once more; the first tile of a vector also fetches rows."""
    for t in range(num_steps):
        if first:
            _fetch(rows, t)
        before, after = tile.history + t * TILE, tile.history + (t + 1) * TILE
        mark = mark_of(marks, t)
        if mark == PADDING:
            for n in range(TILE_STATES):
                store(after, n * WIDTH, load(before, n * WIDTH))
        else:
            if mark == RESTARTS:
                before = tile.nothing
            B, C = tile.B + t * tile.matrix_stride, tile.C + t * tile.matrix_stride
            dt, u, decays = get(lines, STEPS, t), get(lines, INPUTS, t), tile.decays + t * TILE
            y = advance(before, after, decays, tile.rates, dt, u, B, C, TILE_STATES, discretization)
            put(lines, OUTPUTS, t, get(lines, OUTPUTS, t) + y)


@jit
def _token_mamba(tile, before, after, decays, dt, u, g, B, C, sum_B, sum_C):
    """One token backward: returns the gradients of u and dt, and takes the carry to before the token."""
    by_dtu, by_exponent = zeros(), zeros()
    dtu = dt * u
    for n in range(TILE_STATES):
        by_state = g * load_scalar(C, n) + load(tile.carry, n * WIDTH)
        store(sum_C, n * WIDTH, load(sum_C, n * WIDTH) + g * load(after, n * WIDTH))
        store(sum_B, n * WIDTH, load(sum_B, n * WIDTH) + by_state * dtu)
        by_dtu = by_dtu + by_state * load_scalar(B, n)
        by_before = by_state * load(decays, n * WIDTH)
        store(tile.carry, n * WIDTH, by_before)
        by_log_decay = by_before * load(before, n * WIDTH)
        by_exponent = by_exponent + by_log_decay * load(tile.rates, n * WIDTH)
        store(tile.sum_A, n * WIDTH, load(tile.sum_A, n * WIDTH) + by_log_decay * dt)
    return by_dtu * dt, by_dtu * u + by_exponent * LN_2


@jit
def _slopes(dt, A, Abar, discretization):
    """The derivative of Abar by dt A, which is also that of Bbar / B by dt, and the derivative of Bbar / B by A."""
    if discretization == ZOH:
        x = dt * A
        # (e^x - (e^x - 1) / x) / x, by its series where the difference would cancel
        series = ((((x * (1 / 840) + 1 / 144) * x + 1 / 30) * x + 1 / 8) * x + 1 / 3) * x + 0.5
        near = broadcast(0.3)
        safe = where_less(absolute(x), near, near, x)
        far = (Abar - (Abar - 1.0) / safe) / safe
        return Abar, dt * dt * where_less(absolute(x), near, series, far)
    r = 0.5 * Abar + 0.5
    return r * r, 0.5 * (dt * r) * (dt * r)


@jit
def _token_general(tile, before, after, dt, u, g, B, C, sum_B, sum_C, discretization):
    """`_token_mamba` for the rules in which Bbar depends on A."""
    by_u, by_dt = zeros(), zeros()
    for n in range(TILE_STATES):
        A = load(tile.rates, n * WIDTH) * LN_2
        Abar, scale = discretize(dt, A, discretization)
        slope, slope_A = _slopes(dt, A, Abar, discretization)
        by_state = g * load_scalar(C, n) + load(tile.carry, n * WIDTH)
        store(sum_C, n * WIDTH, load(sum_C, n * WIDTH) + g * load(after, n * WIDTH))
        store(sum_B, n * WIDTH, load(sum_B, n * WIDTH) + by_state * scale * u)
        by_u = by_u + by_state * scale * load_scalar(B, n)
        store(tile.carry, n * WIDTH, by_state * Abar)
        by_scale = by_state * u * load_scalar(B, n)
        by_exponent = by_state * load(before, n * WIDTH) * slope
        by_dt = by_dt + by_exponent * A + by_scale * slope
        store(tile.sum_A, n * WIDTH, load(tile.sum_A, n * WIDTH) + by_exponent * dt + by_scale * slope_A)
    return by_u, by_dt


@jit
def _reverse(lines, tile, marks, discretization, num_steps):
    """The recurrence of a chunk backward."""
    for t in range(num_steps - 1, -1, -1):
        mark = mark_of(marks, t)
        if mark != PADDING:
            before, after = tile.history + t * TILE, tile.history + (t + 1) * TILE
            if mark == RESTARTS:
                before = tile.nothing
            dt, u, g = get(lines, STEPS, t), get(lines, INPUTS, t), get(lines, GRADS, t)
            B, C = tile.B + t * tile.matrix_stride, tile.C + t * tile.matrix_stride
            sum_B, sum_C = tile.sum_B + t * tile.sum_stride, tile.sum_C + t * tile.sum_stride
            if discretization == MAMBA:
                decays = tile.decays + t * TILE
                by_u, by_dt = _token_mamba(tile, before, after, decays, dt, u, g, B, C, sum_B, sum_C)
            else:
                by_u, by_dt = _token_general(tile, before, after, dt, u, g, B, C, sum_B, sum_C, discretization)
            put(lines, GRADS_U, t, get(lines, GRADS_U, t) + by_u)
            put(lines, GRADS_DT, t, get(lines, GRADS_DT, t) + by_dt)
            if mark == RESTARTS:
                clear(tile.carry, TILE_STATES)


@jit
def _finish(lines, rows, sum_D, sum_bias, marks, num_steps):
    """Write the gradients of a chunk's tokens and add to the vectors at sum_D and sum_bias."""
    by_D, by_bias = load(sum_D, 0), load(sum_bias, 0)
    for t in range(num_steps):
        by_u, by_dt = get(lines, GRADS_U, t), get(lines, GRADS_DT, t) * get(lines, SLOPES, t)
        by_z = get(lines, GATES, t) * get(lines, OUTPUTS, t) if rows.z.address != 0 else zeros()
        if mark_of(marks, t) == PADDING:
            by_u, by_dt, by_z = zeros(), zeros(), zeros()
        else:
            by_D = by_D + get(lines, GRADS, t) * get(lines, INPUTS, t)
            by_bias = by_bias + by_dt
        write(rows.grad_u, t, by_u)
        write(rows.grad_dt, t, by_dt)
        if rows.z.address != 0:
            write(rows.grad_z, t, by_z)
    store(sum_D, 0, by_D)
    store(sum_bias, 0, by_bias)


@jit
def _sum_lanes(target, index, stride, source, source_row, num_states, num_steps):
    """Sums over the channels of a block: [t n lanes] into rows of n at `target`."""
    for t in range(num_steps):
        for n in range(0, num_states, WIDTH):
            total = sums_of_vectors(source + t * source_row + n * BYTES)
            store_any(target, index + t * stride + n, total, num_states - n, 0)


@jit
def _streams(tensors, row, t, c, count):
    """The rows of each tensor."""
    return Streams(
        rows_of(tensors.u, row, t, c, count),
        rows_of(tensors.dt, row, t, c, count),
        rows_of(tensors.z, row, t, c, count),
        rows_of(tensors.grad_y, row, t, c, count),
        rows_of(tensors.grad_u, row, t, c, count),
        rows_of(tensors.grad_dt, row, t, c, count),
        rows_of(tensors.grad_z, row, t, c, count),
    )


@jit
def backward(
    item, worker, u, u_b, u_t, u_bf16, dt, dt_b, dt_t, dt_bf16, z, z_b, z_t, z_bf16,
    B, B_b, B_t, B_g, B_bf16, C, C_b, C_t, C_g, C_bf16, A, D, dt_bias, marks,
    length, channels, groups, num_states, padded, block, blocks, dt_softplus, discretization, memory, memory_row,
    g, g_b, g_t, g_bf16, grad_final, starts, grad_u, grad_dt, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias,
    grad_initial,
):  # fmt: skip
    """All gradients: of A [b n d], D and dt_bias [b d] for each row, of B and C [b blocks t g n] for each block."""
    place = place_of(item, channels, groups, blocks, block)
    row, vectors = place.row, place.vectors
    tensors = Streams(
        Tensor(u, u_b, u_t, u_bf16),
        Tensor(dt, dt_b, dt_t, dt_bf16),
        Tensor(z, z_b, z_t, z_bf16),
        Tensor(g, g_b, g_t, g_bf16),
        Tensor(grad_u, length * channels, channels, u_bf16),
        Tensor(grad_dt, length * channels, channels, dt_bf16),
        Tensor(grad_z, length * channels, channels, z_bf16),
    )
    all_B, all_C = Matrix(B, B_b, B_t, B_g, B_bf16), Matrix(C, C_b, C_t, C_g, C_bf16)
    lines_size, column = NUM_LINES * CHUNK * BYTES, padded * BYTES
    sum_stride = column + BYTES  # not a power of two, to use all the sets of the cache
    lines = memory + worker * memory_row * 4  # [vectors lines chunk lanes]
    history = lines + block * lines_size
    decays = history + (CHUNK + 1) * TILE
    nothing = decays + CHUNK * TILE
    Bk = nothing + TILE  # [chunk n]
    Ck = Bk + CHUNK * padded * 4
    sums_B = Ck + CHUNK * padded * 4  # [chunk n lanes]
    sums_C = sums_B + CHUNK * sum_stride
    rates = sums_C + CHUNK * sum_stride  # [vectors n lanes]
    carries, sums_A = rates + block * column, rates + 2 * block * column
    sums_D = rates + 3 * block * column  # [vectors lanes]
    sums_bias = sums_D + block * BYTES
    clear(nothing, TILE_STATES)
    clear(sums_A, block * padded)
    clear(sums_D, 2 * block)
    for v in range(vectors):
        c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
        at = row * num_states * channels + c
        load_columns(rates + v * column, A, c, channels, num_states, padded, count)
        load_columns(carries + v * column, grad_final, at, channels, num_states, padded, count)

    num_chunks = (length + CHUNK - 1) // CHUNK
    for k in range(num_chunks - 1, -1, -1):
        t0 = k * CHUNK
        num_steps = min(CHUNK, length - t0)
        here = marks + row * length + t0 if marks != 0 else 0
        load_matrix(Bk, all_B, place, t0, num_steps, num_states, padded)
        load_matrix(Ck, all_C, place, t0, num_steps, num_states, padded)
        clear(sums_B, 2 * CHUNK * (padded + 1))
        for v in range(vectors):
            c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
            rows = _streams(tensors, row, t0, c, count)
            bias, skip = optional(dt_bias, c, count), optional(D, c, count)
            _prepare(lines + v * lines_size, rows, bias, skip, dt_softplus, num_steps)
        for n in range(0, num_states, TILE_STATES):
            for v in range(vectors):
                c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
                start = ((row * num_chunks + k) * num_states + n) * channels + c
                load_columns(history, starts, start, channels, num_states - n, TILE_STATES, count)
                at = v * column + n * BYTES
                tile = Tile(
                    history, decays, nothing, rates + at, carries + at, sums_A + at,
                    sums_B + n * BYTES, sums_C + n * BYTES, sum_stride, Bk + n * 4, Ck + n * 4, padded * 4,
                )  # fmt: skip
                rows = _streams(tensors, row, t0, c, count)
                _replay(lines + v * lines_size, rows, tile, here, n == 0, discretization, num_steps)
                _reverse(lines + v * lines_size, tile, here, discretization, num_steps)
        for v in range(vectors):
            c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
            rows = _streams(tensors, row, t0, c, count)
            _finish(lines + v * lines_size, rows, sums_D + v * BYTES, sums_bias + v * BYTES, here, num_steps)
        part = ((row * blocks + item % blocks) * length + t0) * groups + place.group
        _sum_lanes(grad_B, part * num_states, groups * num_states, sums_B, sum_stride, num_states, num_steps)
        _sum_lanes(grad_C, part * num_states, groups * num_states, sums_C, sum_stride, num_states, num_steps)
    for v in range(vectors):
        c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
        at = row * num_states * channels + c
        store_columns(grad_A, at, channels, sums_A + v * column, num_states, count)
        store_columns(grad_initial, at, channels, carries + v * column, num_states, count)
        store_any(grad_D, row * channels + c, load(sums_D, v * WIDTH), count, 0)
        store_any(grad_bias, row * channels + c, load(sums_bias, v * WIDTH), count, 0)
