# pyright: basic, reportMissingParameterType=false
# Numba infers the types of kernels.
"""One token through a feed-forward layer, dense or of experts, for Numba. Imported only to compile.

A group is some rows of the batch and one expert: all rows where the layer is dense, one row and one of its choices
where there is a router. A work item is a row to normalise and route, a block of a group's inner rows, or of outputs.
"""

from statespan.ops.decode_step.cpu_arguments import SILU
from statespan.ops.decode_step.cpu_kernels import add_residual, normalize_row
from statespan.ops.linear.cpu_kernels import products_of
from statespan.ops.numba_kernels.gates import fast_sigmoid, fast_silu
from statespan.ops.numba_kernels.loads import get_lane, store_int64
from statespan.ops.numba_kernels.phases import wait_until
from statespan.ops.numba_kernels.special_functions import exp
from statespan.ops.numba_kernels.vector import (
    WIDTH,
    broadcast,
    jit,
    load_any,
    load_int64,
    load_scalar,
    maximum,
    store_any,
    store_scalar,
    zeros,
)


@jit
def _score(logit, largest, sigmoid):
    """sigmoid(logit), or e^(logit - largest), of which softmax is made."""
    if sigmoid != 0:
        return get_lane(fast_sigmoid(broadcast(logit)), 0)
    return get_lane(exp(broadcast(logit - largest)), 0)


@jit
def _choose(logits, experts, top_k, chosen, weights, sigmoid, renormalize):
    """Write the top_k experts of one row, largest logit first, and their scores. The logits are used up."""
    largest, total = load_scalar(logits, 0), 0.0
    for e in range(1, experts):
        largest = max(largest, load_scalar(logits, e))
    for e in range(experts):
        total += _score(load_scalar(logits, e), largest, sigmoid)
    if sigmoid != 0:
        total = 1.0
    if renormalize != 0:
        total = 0.0
    for k in range(top_k):
        best = 0
        for e in range(1, experts):
            if load_scalar(logits, e) > load_scalar(logits, best):
                best = e
        score = _score(load_scalar(logits, best), largest, sigmoid)
        store_scalar(logits, best, -3.0e38)
        store_int64(chosen, k, best)
        store_scalar(weights, k, score)
        if renormalize != 0:
            total += score
    for k in range(top_k):
        store_scalar(weights, k, load_scalar(weights, k) / total)


@jit
def _activate(inner, gate, first, last, gated, activation):
    """inner = act(gate) * inner, or act(inner)."""
    for i in range(first, last, WIDTH):
        count = min(WIDTH, last - i)
        value = load_any(inner, i, count, 0)
        argument = value
        if gated != 0:
            argument = load_any(gate, i, count, 0)
        if activation == SILU:
            argument = fast_silu(argument)
        else:
            argument = maximum(argument, zeros())
        if gated != 0:
            argument = argument * value
        store_any(inner, i, argument, count, 0)


@jit
def _weighted_sum(first, last, row, top_k, size, parts, weights, mixed):
    """mixed[row] = sum over k of weights[row, k] * parts[row, k] in the columns first .. last - 1."""
    for i in range(first, last, WIDTH):
        count, total = min(WIDTH, last - i), zeros()
        for k in range(top_k):
            part = load_any(parts, (row * top_k + k) * size + i, count, 0)
            total = part * load_scalar(weights, row * top_k + k) + total
        store_any(mixed, row * size + i, total, count, 0)


@jit
def _offset(address, elements, size):
    """The address `elements` of `size` bytes on; 0 stays 0."""
    if address == 0:
        return 0
    return address + elements * size


def feed_forward_step(
    item, worker, finished, hidden, y, normed, logits, chosen, weights, gate, inner, parts, mixed, norm, router,
    router_bias, up_proj, up_scale, up_bias, down_proj, down_scale, down_bias, rows, hidden_size, inner_size, experts,
    top_k, up_block, down_block, hidden_bf16, weight_bf16, router_kind, sigmoid, renormalize, gated, activation, kind,
    weight_bytes, epsilon,
):  # fmt: skip
    """Norm and router; up projection and activation; down projection, the experts' sum and residual."""
    up_blocks, up_size, groups, group_rows = (inner_size + up_block - 1) // up_block, inner_size, 1, rows
    if gated != 0:
        up_size = 2 * inner_size
    if experts != 0:
        groups, group_rows = rows * top_k, 1
    after_up = rows + groups * up_blocks
    if item < rows:
        normalize_row(item, hidden, hidden_bf16, normed, hidden_size, norm, weight_bf16, epsilon)
        if experts != 0:
            products_of(
                0, experts, normed + item * hidden_size * 4, hidden_size, 1, router, hidden_size, hidden_size, 0,
                router_bias, logits + item * experts * 4, experts, 0, router_kind,
            )  # fmt: skip
            _choose(
                logits + item * experts * 4, experts, top_k, chosen + item * top_k * 8, weights + item * top_k * 4,
                sigmoid, renormalize,
            )  # fmt: skip
    elif item < after_up:
        wait_until(finished, rows)
        group, first = (item - rows) // up_blocks, (item - rows) % up_blocks * up_block
        last, expert, row = min(inner_size, first + up_block), 0, 0
        if experts != 0:
            expert, row = load_int64(chosen, group), group // top_k
        matrix = up_proj + expert * up_size * hidden_size * weight_bytes
        scale, bias = _offset(up_scale, expert * up_size, 4), _offset(up_bias, expert * up_size, 4)
        x, out = normed + row * hidden_size * 4, inner + group * inner_size * 4
        if gated != 0:
            products_of(
                first, last, x, hidden_size, group_rows, matrix, hidden_size, hidden_size, scale, bias,
                gate + group * inner_size * 4, inner_size, 0, kind,
            )  # fmt: skip
            matrix = matrix + inner_size * hidden_size * weight_bytes
            scale, bias = _offset(scale, inner_size, 4), _offset(bias, inner_size, 4)
        products_of(
            first, last, x, hidden_size, group_rows, matrix, hidden_size, hidden_size, scale, bias, out, inner_size, 0,
            kind,
        )  # fmt: skip
        for r in range(group_rows):
            at = r * inner_size * 4
            _activate(out + at, gate + group * inner_size * 4 + at, first, last, gated, activation)
    else:
        wait_until(finished, after_up)
        first = (item - after_up) * down_block
        last = min(hidden_size, first + down_block)
        target = mixed
        if experts != 0:
            target = parts
        for group in range(groups):
            expert = 0
            if experts != 0:
                expert = load_int64(chosen, group)
            products_of(
                first, last, inner + group * inner_size * 4, inner_size, group_rows,
                down_proj + expert * hidden_size * inner_size * weight_bytes, inner_size, inner_size,
                _offset(down_scale, expert * hidden_size, 4), _offset(down_bias, expert * hidden_size, 4),
                target + group * hidden_size * 4, hidden_size, 0, kind,
            )  # fmt: skip
        if experts != 0:
            for row in range(rows):
                _weighted_sum(first, last, row, top_k, hidden_size, parts, weights, mixed)
        add_residual(first, last, rows, hidden_size, hidden, mixed, y, hidden_bf16)
