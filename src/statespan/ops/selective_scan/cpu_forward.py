# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""The forward kernel of the selective scan; `cpu.py` is its host side. Imported only to compile."""

from statespan.ops.numba_kernels.special_functions import sigmoid, softplus
from statespan.ops.numba_kernels.vector import WIDTH, jit, prefetch, prefetch_to_write, zeros
from statespan.ops.segments import PADDING, RESTARTS
from statespan.ops.selective_scan.cpu import CHUNK
from statespan.ops.selective_scan.cpu_recurrence import (
    BYTES,
    Matrix,
    Rows,
    address_of,
    advance,
    clear,
    get,
    load_columns,
    mark_of,
    optional,
    place_of,
    put,
    read,
    store_columns,
    write,
)

STEPS, INPUTS, OUTPUTS = 0, 1, 2  # scratch arrays [chunk lanes]


@jit
def _prepare(lines, u, dt, bias, dt_softplus, num_steps):
    """Step sizes and inputs as float32 vectors."""
    for t in range(num_steps):
        step = read(dt, t) + bias
        put(lines, STEPS, t, softplus(step) if dt_softplus != 0 else step)
        put(lines, INPUTS, t, read(u, t))


@jit
def _scan(lines, states, rates, u, dt, z, y, B, C, marks, num_states, discretization, num_steps):
    """The recurrence over a chunk."""
    for t in range(num_steps):
        prefetch(address_of(u, CHUNK + t))
        prefetch(address_of(dt, CHUNK + t))
        prefetch(address_of(z, CHUNK + t))
        prefetch_to_write(address_of(y, t))
        mark = mark_of(marks, t)
        if mark == RESTARTS:
            clear(states, num_states)
        if mark == PADDING:
            put(lines, OUTPUTS, t, zeros())
        else:
            Bt, Ct = B.address + t * B.stride, C.address + t * C.stride
            step, value = get(lines, STEPS, t), get(lines, INPUTS, t)
            put(lines, OUTPUTS, t, advance(states, states, 0, rates, step, value, Bt, Ct, num_states, discretization))


@jit
def _finish(lines, z, y, skip, marks, num_steps):
    """Skip and gate."""
    for t in range(num_steps):
        value = get(lines, OUTPUTS, t) + skip * get(lines, INPUTS, t)
        if z.address != 0:
            gate = read(z, t)
            value = value * gate * sigmoid(gate)
        if mark_of(marks, t) == PADDING:
            value = zeros()
        write(y, t, value)


@jit
def forward(
    item, worker, u, u_b, u_t, u_bf16, dt, dt_b, dt_t, dt_bf16, z, z_b, z_t, z_bf16, B, B_b, B_t, B_g, C, C_b, C_t, C_g,
    A, D, dt_bias, marks, length, channels, groups, num_states, block, blocks, dt_softplus, discretization,
    memory, memory_row, initial, y, y_bf16, final, starts,
):  # fmt: skip
    """y, the final state, and the states before each chunk, which the backward begins from.

    A is A log2(e) as [n d]; states are [b n d], starts [b chunks n d].
    """
    row, group, first, end, vectors = place_of(item, channels, groups, blocks, block)
    lines = memory + worker * memory_row * 4
    all_rates = lines + 3 * CHUNK * BYTES  # [vectors n lanes]
    all_states = all_rates + block * num_states * BYTES
    for v in range(vectors):
        c, offset = first + v * WIDTH, v * num_states * BYTES
        load_columns(all_rates + offset, A, c, channels, num_states, end - c)
        load_columns(all_states + offset, initial, row * num_states * channels + c, channels, num_states, end - c)

    num_chunks = (length + CHUNK - 1) // CHUNK
    for k in range(num_chunks):
        t0 = k * CHUNK
        num_steps = min(CHUNK, length - t0)
        token = row * length + t0
        here = marks + token if marks != 0 else 0
        B_here = Matrix(B + (row * B_b + t0 * B_t + group * B_g) * 4, B_t * 4)
        C_here = Matrix(C + (row * C_b + t0 * C_t + group * C_g) * 4, C_t * 4)
        for v in range(vectors):
            c, offset = first + v * WIDTH, v * num_states * BYTES
            count, rates, states = end - c, all_rates + offset, all_states + offset
            if starts != 0:
                start = (row * num_chunks + k) * num_states * channels + c
                store_columns(starts, start, channels, states, num_states, count)
            u_rows = Rows(u, row * u_b + t0 * u_t + c, u_t, u_bf16, count)
            dt_rows = Rows(dt, row * dt_b + t0 * dt_t + c, dt_t, dt_bf16, count)
            z_rows = Rows(z, row * z_b + t0 * z_t + c, z_t, z_bf16, count)
            y_rows = Rows(y, token * channels + c, channels, y_bf16, count)
            _prepare(lines, u_rows, dt_rows, optional(dt_bias, c, count), dt_softplus, num_steps)
            _scan(
                lines,
                states,
                rates,
                u_rows,
                dt_rows,
                z_rows,
                y_rows,
                B_here,
                C_here,
                here,
                num_states,
                discretization,
                num_steps,
            )
            _finish(lines, z_rows, y_rows, optional(D, c, count), here, num_steps)
    for v in range(vectors):
        c, offset = first + v * WIDTH, v * num_states * BYTES
        store_columns(final, row * num_states * channels + c, channels, all_states + offset, num_states, end - c)
