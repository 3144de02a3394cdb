# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""What the forward and the backward kernel of the selective scan share. Imported only to compile.

A work item is a batch row, a group, and a block of vectors of its channels, one channel a lane. Time is cut into
chunks, so that what a chunk needs stays in the caches, and the rows of the next one are asked for in time. The states
of a vector stand in scratch memory as [n lanes]: streaming them through the first-level cache costs nothing beside the
exponentials.
"""

import math
from typing import NamedTuple

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.numba_kernels.special_functions import LOG2_E, exp2, exp2_minus_1
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    absolute,
    broadcast,
    jit,
    load,
    load_any,
    load_int8,
    load_scalar,
    store,
    store_any,
    where_less,
    zeros,
)
from statespan.ops.segments import CONTINUES
from statespan.ops.selective_scan.cpu import CHUNK

MAMBA, ZOH = DISCRETIZATIONS["mamba"], DISCRETIZATIONS["zoh"]
BYTES = 4 * WIDTH  # of a vector
LN_2 = math.log(2)


class Place(NamedTuple):
    """Which channels of which row a work item has."""

    row: int
    group: int
    first: int  # channel
    end: int  # channel
    vectors: int


class Tensor(NamedTuple):
    """A [b t d] tensor; address 0: there is none."""

    address: int
    row_stride: int  # elements
    stride: int  # elements
    bf16: int


class Rows(NamedTuple):
    """One vector of channels of a Tensor, from a step on."""

    address: int
    index: int
    stride: int
    bf16: int
    count: int  # lanes in use


class Matrix(NamedTuple):
    """B or C, [b t g n]."""

    address: int
    row_stride: int  # elements
    stride: int  # elements
    group_stride: int  # elements
    bf16: int


@jit
def place_of(item, channels, groups, blocks, block):
    """The work item's place."""
    group_size = channels // groups
    group = item // blocks % groups
    first = group * group_size + item % blocks * block * WIDTH
    end = min(first + block * WIDTH, (group + 1) * group_size)
    return Place(item // blocks // groups, group, first, end, (end - first + WIDTH - 1) // WIDTH)


@jit
def rows_of(tensor, row, t, c, count):
    """The rows of the channels from c on, from step t on."""
    index = row * tensor.row_stride + t * tensor.stride + c
    return Rows(tensor.address, index, tensor.stride, tensor.bf16, count)


@jit
def address_of(rows, t):
    """Where the vector of step t stands."""
    return rows.address + (rows.index + t * rows.stride) * (2 if rows.bf16 != 0 else 4)


@jit
def read(rows, t):
    """The vector of step t."""
    return load_any(rows.address, rows.index + t * rows.stride, rows.count, rows.bf16)


@jit
def write(rows, t, value):
    """Set the vector of step t."""
    store_any(rows.address, rows.index + t * rows.stride, value, rows.count, rows.bf16)


@jit
def get(lines, name, t):
    """Step t of scratch array `name`, one of several [chunk lanes]."""
    return load(lines, (name * CHUNK + t) * WIDTH)


@jit
def put(lines, name, t, value):
    """Set step t of scratch array `name`."""
    store(lines, (name * CHUNK + t) * WIDTH, value)


@jit
def optional(address, index, count):
    """Lanes of a float32 array, or zeros where there is none."""
    return load_any(address, index, count, 0) if address != 0 else zeros()


@jit
def mark_of(marks, t):
    """CONTINUES, RESTARTS or PADDING."""
    return load_int8(marks, t) if marks != 0 else CONTINUES


@jit
def clear(target, num_vectors):
    """Set vectors to zero."""
    for n in range(num_vectors):
        store(target, n * WIDTH, zeros())


@jit
def load_matrix(target, matrix, place, t0, num_steps, num_states, padded):
    """A chunk's [t n] of the item's group as float32; rows are `padded` long, zeros behind num_states."""
    index = place.row * matrix.row_stride + place.group * matrix.group_stride
    for t in range(num_steps):
        for n in range(0, num_states, WIDTH):
            value = load_any(matrix.address, index + (t0 + t) * matrix.stride + n, num_states - n, matrix.bf16)
            store(target, t * padded + n, value)


@jit
def load_columns(target, source, index, stride, num_states, padded, count):
    """[n lanes] from a row-major [n d] array, zeros behind num_states and where there is no array."""
    for n in range(padded):
        store(target, n * WIDTH, optional(source if n < num_states else 0, index + n * stride, count))


@jit
def store_columns(target, index, stride, source, num_states, count):
    """[n lanes] into a row-major [n d] array."""
    for n in range(num_states):
        store_any(target, index + n * stride, load(source, n * WIDTH), count, 0)


@jit
def discretize(dt, A, discretization):
    """Abar and Bbar / B of zero-order hold or the bilinear rule."""
    if discretization == ZOH:
        Abar, less_1 = exp2_minus_1(dt * A * LOG2_E)
        tiny = broadcast(1e-30)  # lanes behind the last channel have A = 0
        return Abar, where_less(absolute(A), tiny, dt, less_1 / where_less(absolute(A), tiny, tiny, A))
    r = 1.0 / (1.0 - 0.5 * dt * A)
    return 2.0 * r - 1.0, dt * r


@jit
def advance(before, after, decays, rates, dt, u, B, C, num_states, discretization):
    """One token: the states after it from those before it; returns C . after.

    All but dt and u are addresses, [n lanes] or [n]. The backward wants the decays, the forward passes decays = 0 and
    the same address as before and after. rates are A log2(e).
    """
    y = zeros()
    dtu = dt * u
    if discretization != MAMBA:
        for n in range(num_states):
            Abar, scale = discretize(dt, load(rates, n * WIDTH) * LN_2, discretization)
            state = Abar * load(before, n * WIDTH) + scale * u * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    elif decays != 0:
        for n in range(num_states):
            Abar = exp2(dt * load(rates, n * WIDTH))
            store(decays, n * WIDTH, Abar)
            state = Abar * load(before, n * WIDTH) + dtu * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    else:
        for n in range(num_states):
            state = exp2(dt * load(rates, n * WIDTH)) * load(before, n * WIDTH) + dtu * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    return y
