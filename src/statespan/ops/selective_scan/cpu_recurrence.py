# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""What the forward and the backward kernel of the selective scan share. Imported only to compile.

A work item is a batch row, a group, and a block of vectors of its channels, one channel a lane. Time is cut into chunks,
so that what a chunk needs stays in the caches. The states of a vector stand in scratch memory, [n lanes], and the innermost
loop over n streams them through the first-level cache, which costs nothing beside the exponentials.
"""

import math
from typing import NamedTuple

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
from statespan.ops.selective_scan.cpu import CHUNK, DISCRETIZATIONS

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


class Rows(NamedTuple):
    """One vector of channels of a [b t d] tensor, from the chunk's first step on; address 0: no tensor."""

    address: int
    index: int
    stride: int
    bf16: int
    count: int  # lanes in use


class Matrix(NamedTuple):
    """One group of a float32 [b t g n] tensor, from the chunk's first step on."""

    address: int
    stride: int  # bytes


@jit
def place_of(item, channels, groups, blocks, block):
    """The work item's place."""
    group_size = channels // groups
    group = item // blocks % groups
    first = group * group_size + item % blocks * block * WIDTH
    end = min(first + block * WIDTH, (group + 1) * group_size)
    return Place(item // blocks // groups, group, first, end, (end - first + WIDTH - 1) // WIDTH)


@jit
def read(rows, t):
    """The vector of step t."""
    return load_any(rows.address, rows.index + t * rows.stride, rows.count, rows.bf16)


@jit
def write(rows, t, value):
    """Set the vector of step t."""
    store_any(rows.address, rows.index + t * rows.stride, value, rows.count, rows.bf16)


@jit
def address_of(rows, t):
    """Where the vector of step t stands."""
    return rows.address + (rows.index + t * rows.stride) * (2 if rows.bf16 != 0 else 4)


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
def load_columns(target, source, index, stride, num_states, count):
    """[n lanes] from a row-major [n d] array, zeros where there is none."""
    for n in range(num_states):
        store(target, n * WIDTH, optional(source, index + n * stride, count))


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
def advance(before, after, decays, A, dt, u, B, C, num_states, discretization):
    """One token: the states after it from those before it; returns C . after. B, C and A log2(e) are addresses.

    The backward also wants the decays; the forward passes 0 and the same address as before and after.
    """
    y = zeros()
    dtu = dt * u
    if discretization != MAMBA:
        for n in range(num_states):
            Abar, scale = discretize(dt, load(A, n * WIDTH) * LN_2, discretization)
            state = Abar * load(before, n * WIDTH) + scale * u * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    elif decays != 0:
        for n in range(num_states):
            Abar = exp2(dt * load(A, n * WIDTH))
            store(decays, n * WIDTH, Abar)
            state = Abar * load(before, n * WIDTH) + dtu * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    else:
        for n in range(num_states):
            state = exp2(dt * load(A, n * WIDTH)) * load(before, n * WIDTH) + dtu * load_scalar(B, n)
            store(after, n * WIDTH, state)
            y = y + state * load_scalar(C, n)
    return y
