# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""The forward kernel of the selective scan; `cpu.py` is its host side. Imported only to compile."""

from typing import NamedTuple

from statespan.ops.numba_kernels.special_functions import silu, softplus
from statespan.ops.numba_kernels.vector import WIDTH, jit, prefetch, prefetch_to_write, zeros
from statespan.ops.segments import PADDING, RESTARTS
from statespan.ops.selective_scan.cpu import CHUNK
from statespan.ops.selective_scan.cpu_recurrence import (
    BYTES,
    Matrix,
    Rows,
    Tensor,
    address_of,
    advance,
    clear,
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

STEPS, INPUTS, OUTPUTS = range(3)  # scratch arrays [chunk lanes]
NUM_LINES = 3


class Streams(NamedTuple):
    """The rows of a vector of channels in a chunk."""

    u: Rows
    dt: Rows
    z: Rows
    y: Rows


@jit
def _prepare(lines, rows, bias, dt_softplus, num_steps):
    """Step sizes and inputs as float32 vectors."""
    for t in range(num_steps):
        step = read(rows.dt, t) + bias
        put(lines, STEPS, t, softplus(step) if dt_softplus != 0 else step)
        put(lines, INPUTS, t, read(rows.u, t))


@jit
def _scan(lines, rows, states, rates, B, C, marks, num_states, padded, discretization, num_steps):
    """The recurrence over a chunk."""
    for t in range(num_steps):
        prefetch(address_of(rows.u, CHUNK + t))
        prefetch(address_of(rows.dt, CHUNK + t))
        prefetch(address_of(rows.z, CHUNK + t))
        prefetch_to_write(address_of(rows.y, t))
        mark = mark_of(marks, t)
        if mark == RESTARTS:
            clear(states, num_states)
        if mark == PADDING:
            put(lines, OUTPUTS, t, zeros())
        else:
            dt, u, row = get(lines, STEPS, t), get(lines, INPUTS, t), t * padded * 4
            y = advance(states, states, 0, rates, dt, u, B + row, C + row, num_states, discretization)
            put(lines, OUTPUTS, t, y)


@jit
def _finish(lines, rows, skip, marks, num_steps):
    """Skip and gate."""
    for t in range(num_steps):
        value = get(lines, OUTPUTS, t) + skip * get(lines, INPUTS, t)
        if rows.z.address != 0:
            value = value * silu(read(rows.z, t))
        if mark_of(marks, t) == PADDING:
            value = zeros()
        write(rows.y, t, value)


@jit
def forward(
    item, worker, u, u_b, u_t, u_bf16, dt, dt_b, dt_t, dt_bf16, z, z_b, z_t, z_bf16,
    B, B_b, B_t, B_g, B_bf16, C, C_b, C_t, C_g, C_bf16, A, D, dt_bias, marks,
    length, channels, groups, num_states, padded, block, blocks, dt_softplus, discretization, memory, memory_row,
    initial, y, y_bf16, final, starts,
):  # fmt: skip
    """y, the final state, and the states before each chunk, which the backward begins from.

    A is A log2(e) as [n d]; states are [b n d], starts [b chunks n d].
    """
    place = place_of(item, channels, groups, blocks, block)
    row, vectors = place.row, place.vectors
    all_u, all_dt, all_z = Tensor(u, u_b, u_t, u_bf16), Tensor(dt, dt_b, dt_t, dt_bf16), Tensor(z, z_b, z_t, z_bf16)
    all_y = Tensor(y, length * channels, channels, y_bf16)
    all_B, all_C = Matrix(B, B_b, B_t, B_g, B_bf16), Matrix(C, C_b, C_t, C_g, C_bf16)
    lines = memory + worker * memory_row * 4
    column = padded * BYTES  # [n lanes]
    Bk = lines + NUM_LINES * CHUNK * BYTES  # [chunk n]
    Ck = Bk + CHUNK * padded * 4
    rates = Ck + CHUNK * padded * 4  # [vectors n lanes]
    states = rates + block * column
    for v in range(vectors):
        c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
        at = row * num_states * channels + c
        load_columns(rates + v * column, A, c, channels, num_states, padded, count)
        load_columns(states + v * column, initial, at, channels, num_states, padded, count)

    num_chunks = (length + CHUNK - 1) // CHUNK
    for k in range(num_chunks):
        t0 = k * CHUNK
        num_steps = min(CHUNK, length - t0)
        here = marks + row * length + t0 if marks != 0 else 0
        load_matrix(Bk, all_B, place, t0, num_steps, num_states, padded)
        load_matrix(Ck, all_C, place, t0, num_steps, num_states, padded)
        for v in range(vectors):
            c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
            h, A_v = states + v * column, rates + v * column
            if starts != 0:
                start = (row * num_chunks + k) * num_states * channels + c
                store_columns(starts, start, channels, h, num_states, count)
            rows = Streams(
                rows_of(all_u, row, t0, c, count),
                rows_of(all_dt, row, t0, c, count),
                rows_of(all_z, row, t0, c, count),
                rows_of(all_y, row, t0, c, count),
            )
            _prepare(lines, rows, optional(dt_bias, c, count), dt_softplus, num_steps)
            _scan(lines, rows, h, A_v, Bk, Ck, here, num_states, padded, discretization, num_steps)
            _finish(lines, rows, optional(D, c, count), here, num_steps)
    for v in range(vectors):
        c, count = place.first + v * WIDTH, place.end - place.first - v * WIDTH
        store_columns(final, row * num_states * channels + c, channels, states + v * column, num_states, count)
