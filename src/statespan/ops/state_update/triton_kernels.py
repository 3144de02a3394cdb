# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""One-token updates in Triton: a program reads a tile of the state, writes the next one and sums over states."""

import triton
import triton.language as tl

from statespan.ops.triton_kernels.functions import discretize, sigmoid, softplus


@triton.jit
def selective(
    state,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    y,
    next_state,
    channels,
    states,
    group_channels,
    u_stride,
    dt_stride,
    B_stride,
    B_group_stride,
    C_stride,
    C_group_stride,
    z_stride,
    DT_SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATES: tl.constexpr,
):
    """One token of Mamba-1's scan for CHANNELS channels of one row, with all their states."""
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    here = channel < channels
    n = tl.arange(0, STATES)[None]
    mask = here[:, None] & (n < states)
    place = channel[:, None] * states + n
    start = batch * channels * states

    step = tl.load(dt + batch * dt_stride + channel, here, 0.0).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + channel, here, 0.0).to(tl.float32)
    if DT_SOFTPLUS:
        step = softplus(step)
    token = tl.load(u + batch * u_stride + channel, here, 0.0).to(tl.float32)
    group = (channel // group_channels)[:, None]
    entering = tl.load(B + batch * B_stride + group * B_group_stride + n, mask, 0.0).to(tl.float32)
    leaving = tl.load(C + batch * C_stride + group * C_group_stride + n, mask, 0.0).to(tl.float32)
    decay, factor = discretize(step[:, None], tl.load(A + place, mask, -1.0).to(tl.float32), DISCRETIZATION)
    value = tl.load(state + start + place, mask, 0.0).to(tl.float32)
    value = decay * value + factor * entering * token[:, None]
    tl.store(next_state + start + place, value, mask)
    out = tl.sum(value * leaving, 1)
    if D is not None:
        out += tl.load(D + channel, here, 0.0).to(tl.float32) * token
    if z is not None:
        gate = tl.load(z + batch * z_stride + channel, here, 0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + batch * channels + channel, out.to(y.dtype.element_ty), here)


@triton.jit
def ssd(
    state,
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    y,
    next_state,
    heads,
    head_dim,
    states,
    group_heads,
    x_stride,
    x_head_stride,
    dt_stride,
    B_stride,
    B_group_stride,
    C_stride,
    C_group_stride,
    D_stride,
    D_dim_stride,
    dt_min,
    dt_max,
    DT_SOFTPLUS: tl.constexpr,
    DISCRETIZATION: tl.constexpr,
    DIMS: tl.constexpr,
    STATES: tl.constexpr,
):
    """One token of Mamba-2's recurrence for DIMS places of one head, with all their states."""
    blocks = tl.cdiv(head_dim, DIMS)
    head = tl.program_id(0) // blocks % heads
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    p = tl.program_id(0) % blocks * DIMS + tl.arange(0, DIMS)
    here = p < head_dim
    n = tl.arange(0, STATES)
    mask = here[:, None] & (n < states)[None]
    place = (batch * heads + head) * head_dim * states + p[:, None] * states + n[None]

    step = tl.load(dt + batch * dt_stride + head).to(tl.float32)
    if dt_bias is not None:
        step += tl.load(dt_bias + head).to(tl.float32)
    if DT_SOFTPLUS:
        step = softplus(step)
    step = tl.maximum(step, dt_min, propagate_nan=tl.PropagateNan.ALL)
    step = tl.minimum(step, dt_max, propagate_nan=tl.PropagateNan.ALL)
    decay, factor = discretize(step, tl.load(A + head).to(tl.float32), DISCRETIZATION)
    token = tl.load(x + batch * x_stride + head * x_head_stride + p, here, 0.0).to(tl.float32)
    group = head // group_heads
    entering = tl.load(B + batch * B_stride + group * B_group_stride + n, n < states, 0.0).to(tl.float32)
    leaving = tl.load(C + batch * C_stride + group * C_group_stride + n, n < states, 0.0).to(tl.float32)
    value = tl.load(state + place, mask, 0.0).to(tl.float32)
    value = decay * value + (factor * token)[:, None] * entering[None]
    tl.store(next_state + place, value, mask)
    out = tl.sum(value * leaving[None], 1)
    if D is not None:
        out += tl.load(D + head * D_stride + p * D_dim_stride, here, 0.0).to(tl.float32) * token
    tl.store(y + (batch * heads + head) * head_dim + p, out.to(y.dtype.element_ty), here)
