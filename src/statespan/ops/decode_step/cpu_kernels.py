# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""One token through a mixer and the norm and residual around it, for Numba. Imported only to compile.

The steps are phases of one kernel, and what passes between them is float32 memory that stays in the cache. A work item
is a row to normalise, a block of a projection's output rows, of channels, or a head.
"""

from statespan.ops.causal_conv1d.cpu_kernels import convolve_channels
from statespan.ops.linear.cpu_kernels import products_of
from statespan.ops.numba_kernels.gates import fast_silu
from statespan.ops.numba_kernels.phases import wait_until
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    jit,
    load_any,
    store_any,
    zeros,
)
from statespan.ops.rms_norm.cpu_kernels import inverse_rms
from statespan.ops.state_update.cpu_kernels import update_channels, update_head


@jit
def _num_blocks(size, block):
    return (size + block - 1) // block


@jit
def add_residual(first, last, rows, size, hidden, mixed, y, bf16):
    """y = hidden + mixed in the columns first .. last - 1; mixed is float32."""
    for row in range(rows):
        for i in range(first, last, WIDTH):
            at, count = row * size + i, min(WIDTH, last - i)
            store_any(y, at, load_any(hidden, at, count, bf16) + load_any(mixed, at, count, 0), count, bf16)


@jit
def rms_norm(x, x_bf16, y, size, weight, weight_bf16, epsilon):
    """y = x / sqrt(mean(x^2) + epsilon) * weight; y is float32."""
    total = zeros()
    for i in range(0, size, WIDTH):
        value = load_any(x, i, size - i, x_bf16)
        total = value * value + total
    scale = inverse_rms(total, size, epsilon)
    for i in range(0, size, WIDTH):
        value = load_any(x, i, size - i, x_bf16) * scale * load_any(weight, i, size - i, weight_bf16)
        store_any(y, i, value, size - i, 0)


@jit
def normalize_row(row, hidden, hidden_bf16, normed, size, weight, weight_bf16, epsilon):
    """A row of the residual stream through the norm; normed is float32."""
    at = row * size
    rms_norm(hidden + at * (4 - 2 * hidden_bf16), hidden_bf16, normed + at * 4, size, weight, weight_bf16, epsilon)


@jit
def _project_and_add(
    first, last, rows, x, channels, out_proj, out_scale, out_bias, mixed, hidden_size, hidden, hidden_bf16, y, kind
):
    """A block of out_proj's rows, added to the residual stream."""
    products_of(
        first, last, x, channels, rows, out_proj, channels, channels, out_scale, out_bias, mixed, hidden_size, 0, kind
    )  # fmt: skip
    add_residual(first, last, rows, hidden_size, hidden, mixed, y, hidden_bf16)


@jit
def _project_and_convolve(
    first, last, rows, hidden, hidden_size, in_proj, in_scale, in_bias, projected, inner, start, channels, conv_state,
    conv_weight, conv_bias, convolved, next_conv, taps, conv_bf16, weight_bf16, kind,
):  # fmt: skip
    """A block of in_proj's rows, and the conv of those that are its channels: `channels` rows from `start` on."""
    products_of(
        first, last, hidden, hidden_size, rows, in_proj, hidden_size, hidden_size, in_scale, in_bias, projected, inner,
        0, kind,
    )  # fmt: skip
    window = (taps - 1) * channels * (4 - 2 * conv_bf16)
    for row in range(rows):
        convolve_channels(
            max(0, first - start), min(channels, last - start), conv_state + row * window,
            projected + (row * inner + start) * 4, conv_weight, conv_bias, convolved + row * channels * 4,
            next_conv + row * window, channels, taps, conv_bf16, 0, weight_bf16, 1,
        )  # fmt: skip


@jit
def _normalize_selection(selected, own, rows, rank, states, dt_norm, B_norm, C_norm, norm_bf16, epsilon):
    """[dt|B|C] of each row with its norms, in the worker's own memory."""
    for row in range(rows):
        offset = row * (rank + 2 * states) * 4
        rms_norm(selected + offset, 0, own + offset, rank, dt_norm, norm_bf16, epsilon)
        offset += rank * 4
        rms_norm(selected + offset, 0, own + offset, states, B_norm, norm_bf16, epsilon)
        offset += states * 4
        rms_norm(selected + offset, 0, own + offset, states, C_norm, norm_bf16, epsilon)


def mamba1_step(
    item, worker, finished, hidden, conv_state, ssm_state, y, next_conv, next_ssm, normed, projected, convolved,
    selected, own, own_size, dt, gated, mixed, norm, in_proj, in_scale, in_bias, conv_weight, conv_bias, x_proj,
    x_scale, dt_proj, dt_scale, dt_bias, dt_norm, B_norm, C_norm, A, D, out_proj, out_scale, out_bias, rows,
    hidden_size, channels, taps, rank, states, in_block, x_block, channel_block, out_block, hidden_bf16, conv_bf16,
    weight_bf16, discretization, kind, epsilon, inner_epsilon,
):  # fmt: skip
    """Norm; in_proj and conv; x_proj; norms, dt_proj, scan and gate; out_proj and residual."""
    inner, selection = 2 * channels, rank + 2 * states
    after_in = rows + _num_blocks(inner, in_block)
    after_x = after_in + _num_blocks(selection, x_block)
    after_scan = after_x + _num_blocks(channels, channel_block)
    if item < rows:
        normalize_row(item, hidden, hidden_bf16, normed, hidden_size, norm, weight_bf16, epsilon)
    elif item < after_in:
        wait_until(finished, rows)
        first = (item - rows) * in_block
        _project_and_convolve(
            first, min(inner, first + in_block), rows, normed, hidden_size, in_proj, in_scale, in_bias, projected,
            inner, 0, channels, conv_state, conv_weight, conv_bias, convolved, next_conv, taps, conv_bf16, weight_bf16,
            kind,
        )  # fmt: skip
    elif item < after_x:
        wait_until(finished, after_in)
        first = (item - after_in) * x_block
        products_of(
            first, min(selection, first + x_block), convolved, channels, rows, x_proj, channels, channels, x_scale, 0,
            selected, selection, 0, kind,
        )  # fmt: skip
    elif item < after_scan:
        wait_until(finished, after_x)
        first = (item - after_x) * channel_block
        last = min(channels, first + channel_block)
        if dt_norm != 0:
            own = own + worker * own_size * 4
            _normalize_selection(selected, own, rows, rank, states, dt_norm, B_norm, C_norm, weight_bf16, inner_epsilon)
            selected = own
        products_of(first, last, selected, selection, rows, dt_proj, rank, rank, dt_scale, 0, dt, channels, 0, kind)
        for row in range(rows):
            update_channels(
                row, first, last, ssm_state, convolved, dt, A, selected + rank * 4, selected + (rank + states) * 4,
                D, projected + channels * 4, dt_bias, gated, next_ssm, channels, states, 1, channels, channels,
                selection, 0, selection, 0, inner, 0, 0, 0, 0, 0, 0, 1, discretization,
            )  # fmt: skip
    else:
        wait_until(finished, after_scan)
        first = (item - after_scan) * out_block
        _project_and_add(
            first, min(hidden_size, first + out_block), rows, gated, channels, out_proj, out_scale, out_bias, mixed,
            hidden_size, hidden, hidden_bf16, y, kind,
        )  # fmt: skip


@jit
def _gate_and_norm(x, z, y, size, weight, weight_bf16, norm_before_gate, epsilon):
    """y = RMSNorm(x silu(z)), or RMSNorm(x) silu(z); without a weight x silu(z)."""
    if norm_before_gate == 0:
        for i in range(0, size, WIDTH):
            value = load_any(x, i, size - i, 0) * fast_silu(load_any(z, i, size - i, 0))
            store_any(y, i, value, size - i, 0)
        x = y
    if weight != 0:
        rms_norm(x, 0, y, size, weight, weight_bf16, epsilon)
        x = y
    if norm_before_gate != 0:
        for i in range(0, size, WIDTH):
            value = load_any(x, i, size - i, 0) * fast_silu(load_any(z, i, size - i, 0))
            store_any(y, i, value, size - i, 0)


def mamba2_step(
    item, worker, finished, hidden, conv_state, ssm_state, y, next_conv, next_ssm, normed, projected, convolved,
    heads_out, gated, mixed, norm, in_proj, in_scale, in_bias, conv_weight, conv_bias, dt_bias, A, D, gate_norm,
    out_proj, out_scale, out_bias, rows, hidden_size, channels, taps, heads, groups, states, norm_size, in_block,
    out_block, hidden_bf16, conv_bf16, weight_bf16, norm_before_gate, discretization, kind, dt_min, dt_max, epsilon,
    inner_epsilon,
):  # fmt: skip
    """Norm; in_proj and conv; SSD a head; gate and norm; out_proj and residual."""
    bc_size = groups * states
    conv_size, norm_groups = channels + 2 * bc_size, channels // norm_size
    inner = channels + conv_size + heads
    after_in = rows + _num_blocks(inner, in_block)
    after_ssd = after_in + rows * heads
    after_gate = after_ssd + rows * norm_groups
    if item < rows:
        normalize_row(item, hidden, hidden_bf16, normed, hidden_size, norm, weight_bf16, epsilon)
    elif item < after_in:
        wait_until(finished, rows)
        first = (item - rows) * in_block
        _project_and_convolve(
            first, min(inner, first + in_block), rows, normed, hidden_size, in_proj, in_scale, in_bias, projected,
            inner, channels, conv_size, conv_state, conv_weight, conv_bias, convolved, next_conv, taps, conv_bf16,
            weight_bf16, kind,
        )  # fmt: skip
    elif item < after_ssd:
        wait_until(finished, after_in)
        row, head = (item - after_in) // heads, (item - after_in) % heads
        update_head(
            row, head, ssm_state, convolved, projected + (channels + conv_size) * 4, A, convolved + channels * 4,
            convolved + (channels + bc_size) * 4, D, dt_bias, heads_out, next_ssm, heads, channels // heads, states,
            groups, conv_size, inner, conv_size, states, conv_size, states, 1, 0, 0, 0, 0, 0, 1, discretization, dt_min,
            dt_max,
        )  # fmt: skip
    elif item < after_gate:
        wait_until(finished, after_ssd)
        row, first = (item - after_ssd) // norm_groups, (item - after_ssd) % norm_groups * norm_size
        at = (row * channels + first) * 4
        if gate_norm != 0:
            gate_norm = gate_norm + first * (4 - 2 * weight_bf16)
        _gate_and_norm(
            heads_out + at, projected + (row * inner + first) * 4, gated + at, norm_size, gate_norm, weight_bf16,
            norm_before_gate, inner_epsilon,
        )  # fmt: skip
    else:
        wait_until(finished, after_gate)
        first = (item - after_gate) * out_block
        _project_and_add(
            first, min(hidden_size, first + out_block), rows, gated, channels, out_proj, out_scale, out_bias, mixed,
            hidden_size, hidden, hidden_bf16, y, kind,
        )  # fmt: skip
