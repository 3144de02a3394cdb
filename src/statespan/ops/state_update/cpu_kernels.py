# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""One step of the Mamba-1 and Mamba-2 recurrences; `cpu.py` is the host side. Imported only to compile."""

import math

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.numba_kernels.gates import fast_silu
from statespan.ops.numba_kernels.loads import get_lane, set_lane, store_scalar_bf16
from statespan.ops.numba_kernels.special_functions import exp2, exp2_minus_1, softplus
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    broadcast,
    horizontal_sum,
    jit,
    load_any,
    load_scalar,
    load_scalar_bf16,
    maximum,
    minimum,
    store_any,
    store_scalar,
    where_less,
    zeros,
)

LOG2_E = 1 / math.log(2)
MAMBA, ZOH = DISCRETIZATIONS["mamba"], DISCRETIZATIONS["zoh"]


@jit
def _scalar(address, index, bf16):
    if bf16 != 0:
        return load_scalar_bf16(address, index)
    return load_scalar(address, index)


@jit
def _discretize(dt, A, discretization):
    """Abar and the factor that turns B into Bbar."""
    if discretization == MAMBA:
        return exp2(A * (dt * LOG2_E)), dt
    if discretization == ZOH:
        decay, decay_minus_1 = exp2_minus_1(A * (dt * LOG2_E))
        return decay, where_less(A, zeros(), decay_minus_1 / A, dt)  # A is 0 in the lanes behind the last state
    half = A * (dt * 0.5)
    inverse = 1.0 / (1.0 - half)
    return (half + 1.0) * inverse, dt * inverse


@jit
def update_channels(
    batch, first, last, state, u, dt, A, B, C, D, z, dt_bias, y, next_state, channels, states, groups, u_stride,
    dt_stride, B_stride, B_group_stride, C_stride, C_group_stride, z_stride, u_bf16, dt_bf16, B_bf16, C_bf16, z_bf16,
    y_bf16, dt_softplus, discretization,
):  # fmt: skip
    """The channels first .. last - 1 of one batch row. Lanes are states, and channels where each has one value."""
    for c in range(first, last, WIDTH):
        count = min(WIDTH, last - c)
        steps = load_any(dt, batch * dt_stride + c, count, dt_bf16)
        if dt_bias != 0:
            steps = steps + load_any(dt_bias, c, count, 0)
        if dt_softplus != 0:
            steps = softplus(steps)
        sums = zeros()
        for i in range(count):
            channel = c + i
            group = channel * groups // channels
            B_row, C_row = batch * B_stride + group * B_group_stride, batch * C_stride + group * C_group_stride
            row = (batch * channels + channel) * states
            step, value = broadcast(get_lane(steps, i)), _scalar(u, batch * u_stride + channel, u_bf16)
            total = zeros()
            for n in range(0, states, WIDTH):
                left = states - n
                decay, scale = _discretize(step, load_any(A, channel * states + n, left, 0), discretization)
                added = scale * value * load_any(B, B_row + n, left, B_bf16)
                h = decay * load_any(state, row + n, left, 0) + added
                store_any(next_state, row + n, h, left, 0)
                total = h * load_any(C, C_row + n, left, C_bf16) + total
            sums = set_lane(sums, i, horizontal_sum(total))
        if D != 0:
            sums = load_any(D, c, count, 0) * load_any(u, batch * u_stride + c, count, u_bf16) + sums
        if z != 0:
            sums = sums * fast_silu(load_any(z, batch * z_stride + c, count, z_bf16))
        store_any(y, batch * channels + c, sums, count, y_bf16)


def selective_state_update(
    item, worker, state, u, dt, A, B, C, D, z, dt_bias, y, next_state, channels, states, groups, channels_per_item,
    u_stride, dt_stride, B_stride, B_group_stride, C_stride, C_group_stride, z_stride, u_bf16, dt_bf16, B_bf16, C_bf16,
    z_bf16, dt_softplus, discretization,
):  # fmt: skip
    """A block of channels of one batch row."""
    items = (channels + channels_per_item - 1) // channels_per_item
    batch, first = item // items, item % items * channels_per_item
    update_channels(
        batch, first, min(channels, first + channels_per_item), state, u, dt, A, B, C, D, z, dt_bias, y, next_state,
        channels, states, groups, u_stride, dt_stride, B_stride, B_group_stride, C_stride, C_group_stride, z_stride,
        u_bf16, dt_bf16, B_bf16, C_bf16, z_bf16, u_bf16, dt_softplus, discretization,
    )  # fmt: skip


@jit
def update_head(
    batch, head, state, x, dt, A, B, C, D, dt_bias, y, next_state, heads, head_dim, states, groups, x_stride, dt_stride,
    B_stride, B_group_stride, C_stride, C_group_stride, D_stride, D_dim_stride, x_bf16, dt_bf16, B_bf16, C_bf16,
    dt_softplus, discretization, dt_min, dt_max,
):  # fmt: skip
    """One head of one batch row. The lanes are states."""
    item = batch * heads + head
    group = head * groups // heads
    B_row, C_row = batch * B_stride + group * B_group_stride, batch * C_stride + group * C_group_stride
    step = broadcast(_scalar(dt, batch * dt_stride + head, dt_bf16))
    if dt_bias != 0:
        step = step + load_scalar(dt_bias, head)
    if dt_softplus != 0:
        step = softplus(step)
    step = minimum(maximum(step, broadcast(dt_min)), broadcast(dt_max))
    decay, scale = _discretize(step, broadcast(load_scalar(A, head)), discretization)
    factor = get_lane(scale, 0)
    for p in range(head_dim):
        row = (item * head_dim + p) * states
        value = _scalar(x, batch * x_stride + head * head_dim + p, x_bf16)
        scaled, total = broadcast(factor * value), zeros()
        for n in range(0, states, WIDTH):
            left = states - n
            h = decay * load_any(state, row + n, left, 0) + scaled * load_any(B, B_row + n, left, B_bf16)
            store_any(next_state, row + n, h, left, 0)
            total = h * load_any(C, C_row + n, left, C_bf16) + total
        result = horizontal_sum(total)
        if D != 0:
            result += load_scalar(D, head * D_stride + p * D_dim_stride) * value
        if x_bf16 != 0:
            store_scalar_bf16(y, item * head_dim + p, result)
        else:
            store_scalar(y, item * head_dim + p, result)


def ssd_state_update(
    item, worker, state, x, dt, A, B, C, D, dt_bias, y, next_state, heads, head_dim, states, groups, x_stride,
    dt_stride, B_stride, B_group_stride, C_stride, C_group_stride, D_stride, D_dim_stride, x_bf16, dt_bf16, B_bf16,
    C_bf16, dt_softplus, discretization, dt_min, dt_max,
):  # fmt: skip
    """One head of one batch row."""
    update_head(
        item // heads, item % heads, state, x, dt, A, B, C, D, dt_bias, y, next_state, heads, head_dim, states, groups,
        x_stride, dt_stride, B_stride, B_group_stride, C_stride, C_group_stride, D_stride, D_dim_stride, x_bf16,
        dt_bf16, B_bf16, C_bf16, dt_softplus, discretization, dt_min, dt_max,
    )  # fmt: skip
