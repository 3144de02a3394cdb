"""Decoding steps on the CPU: tensors to the kernels of `cpu_kernels.py` and `cpu_feed_forward.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statespan.ops.activation import GATED
from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.decode_step.cpu_arguments import (
    ACTIVATIONS,
    BF16,
    CHANNEL_BLOCK,
    FLOATS,
    LINE,
    Addresses,
    can_run,
    expect,
    num_blocks,
    workers_for,
)
from statespan.ops.decode_step.weights import FeedForwardWeights, Mamba1Weights, Mamba2Weights, Projection
from statespan.ops.linear.cpu import KINDS, rows_per_item
from statespan.ops.numba_kernels import Kernel

_mamba1 = Kernel(
    "statespan.ops.decode_step.cpu_kernels",
    "mamba1_step",
    "finished hidden conv_state ssm_state y next_conv next_ssm normed projected convolved selected own own_size dt"
    " gated mixed norm in_proj in_scale in_bias conv_weight conv_bias x_proj x_scale dt_proj dt_scale dt_bias dt_norm"
    " B_norm C_norm A D out_proj out_scale out_bias rows hidden_size channels taps rank states in_block x_block"
    " channel_block out_block hidden_bf16 conv_bf16 weight_bf16 discretization kind",
    "epsilon inner_epsilon",
)
_mamba2 = Kernel(
    "statespan.ops.decode_step.cpu_kernels",
    "mamba2_step",
    "finished hidden conv_state ssm_state y next_conv next_ssm normed projected convolved heads_out gated mixed norm"
    " in_proj in_scale in_bias conv_weight conv_bias dt_bias A D gate_norm out_proj out_scale out_bias rows"
    " hidden_size channels taps heads groups states norm_size in_block out_block hidden_bf16 conv_bf16 weight_bf16"
    " norm_before_gate discretization kind",
    "dt_min dt_max epsilon inner_epsilon",
)
_feed_forward = Kernel(
    "statespan.ops.decode_step.cpu_feed_forward",
    "feed_forward_step",
    "finished hidden y normed logits chosen weights gate inner parts mixed norm router router_bias up_proj up_scale"
    " up_bias down_proj down_scale down_bias rows hidden_size inner_size experts top_k up_block down_block hidden_bf16"
    " weight_bf16 router_kind sigmoid renormalize gated activation kind weight_bytes",
    "epsilon",
)


def mamba1(
    weights: Mamba1Weights, num_rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype
) -> Callable[..., Any] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    w, address = weights, Addresses()
    projections = [w.in_proj, w.x_proj, w.dt_proj, w.out_proj]
    plain = [w.norm, w.conv_weight, *([] if w.conv_bias is None else [w.conv_bias]), *w.inner_norms]
    if not can_run(num_rows, projections, plain, [w.dt_bias, w.A_log, w.D]):
        return None
    (channels, states), rank, hidden_size = w.A_log.shape, w.dt_proj.weight.shape[1], w.norm.shape[0]
    selection = rank + 2 * states
    in_block, x_block, out_block = (
        rows_per_item(w.in_proj.weight),
        rows_per_item(w.x_proj.weight),
        rows_per_item(w.out_proj.weight),
    )
    num_items = (
        num_rows
        + num_blocks(2 * channels, in_block)
        + num_blocks(selection, x_block)
        + num_blocks(channels, CHANNEL_BLOCK)
        + num_blocks(hidden_size, out_block)
    )
    workers = workers_for(w.in_proj, num_items)
    own_size = LINE * num_blocks(num_rows * selection, LINE)
    sizes = (hidden_size, 2 * channels, channels, selection, channels, channels, hidden_size)
    *regions, own = address.scratch(*(num_rows * size for size in sizes), workers * own_size)
    normed, projected, convolved, selected, dt, gated, mixed = regions
    dt_norm, B_norm, C_norm = (address.of(norm) for norm in w.inner_norms or (None, None, None))
    x_weight, x_scale, _ = address.projection(w.x_proj)
    dt_weight, dt_scale, _ = address.projection(w.dt_proj)
    call = _mamba1.prepare(
        num_items,
        workers,
        6,
        *(normed, projected, convolved, selected, own, own_size, dt, gated, mixed),
        address.of(w.norm),
        *address.projection(w.in_proj),
        address.of(w.conv_weight),
        address.of(w.conv_bias),
        *(x_weight, x_scale, dt_weight, dt_scale),
        address.of(w.dt_bias),
        *(dt_norm, B_norm, C_norm),
        address.of(-torch.exp(w.A_log)),
        address.of(w.D),
        *address.projection(w.out_proj),
        *(num_rows, hidden_size, channels, w.conv_weight.shape[1], rank, states),
        *(in_block, x_block, CHANNEL_BLOCK, out_block),
        hidden_dtype is BF16,
        conv_dtype is BF16,
        w.norm.dtype is BF16,
        DISCRETIZATIONS[w.discretization],
        KINDS[w.in_proj.weight.dtype],
        *(w.norm_epsilon, w.inner_norm_epsilon),
    )
    conv, ssm = (num_rows, w.conv_weight.shape[1] - 1, channels), (num_rows, channels, states)
    return _mixer_step(call, address, ((num_rows, hidden_size), hidden_dtype), (conv, conv_dtype), ssm)


def mamba2(
    weights: Mamba2Weights, num_rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype
) -> Callable[..., Any] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    w, address = weights, Addresses()
    plain = [w.norm, w.conv_weight, *(weight for weight in (w.conv_bias, w.gate_norm) if weight is not None)]
    if not can_run(num_rows, [w.in_proj, w.out_proj], plain, [w.dt_bias, w.A_log, w.D]):
        return None
    hidden_size, channels = w.out_proj.weight.shape
    (conv_size, taps), heads = w.conv_weight.shape, w.A_log.shape[0]
    in_block, out_block = rows_per_item(w.in_proj.weight), rows_per_item(w.out_proj.weight)
    num_items = (
        num_rows
        + num_blocks(w.in_proj.weight.shape[0], in_block)
        + num_rows * (heads + channels // w.gate_norm_size)
        + num_blocks(hidden_size, out_block)
    )
    sizes = (hidden_size, w.in_proj.weight.shape[0], conv_size, channels, channels, hidden_size)
    call = _mamba2.prepare(
        num_items,
        workers_for(w.in_proj, num_items),
        6,
        *address.scratch(*(num_rows * size for size in sizes)),
        address.of(w.norm),
        *address.projection(w.in_proj),
        address.of(w.conv_weight),
        address.of(w.conv_bias),
        address.of(w.dt_bias),
        address.of(-torch.exp(w.A_log)),
        address.of(w.D),
        address.of(w.gate_norm),
        *address.projection(w.out_proj),
        *(num_rows, hidden_size, channels, taps, heads),
        (conv_size - channels) // (2 * w.state_size),
        *(w.state_size, w.gate_norm_size, in_block, out_block),
        hidden_dtype is BF16,
        conv_dtype is BF16,
        w.norm.dtype is BF16,
        w.norm_before_gate,
        DISCRETIZATIONS[w.discretization],
        KINDS[w.in_proj.weight.dtype],
        *(*w.dt_limit, w.norm_epsilon, w.gate_norm_epsilon),
    )
    conv, ssm = (num_rows, taps - 1, conv_size), (num_rows, heads, channels // heads, w.state_size)
    return _mixer_step(call, address, ((num_rows, hidden_size), hidden_dtype), (conv, conv_dtype), ssm)


def _mixer_step(
    call: Callable[..., None],
    address: Addresses,
    of_hidden: tuple[tuple[int, ...], torch.dtype],
    of_conv: tuple[tuple[int, ...], torch.dtype],
    ssm_shape: tuple[int, ...],
) -> Callable[..., Any]:
    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = expect("hidden", hidden, *of_hidden)
        conv_state = expect("conv_state", conv_state, *of_conv)
        ssm_state = expect("ssm_state", ssm_state, ssm_shape, torch.float32)
        results = torch.empty_like(hidden), torch.empty_like(conv_state), torch.empty_like(ssm_state)
        y, next_conv, next_ssm = results
        call(
            hidden.data_ptr(),
            conv_state.data_ptr(),
            ssm_state.data_ptr(),
            y.data_ptr(),
            next_conv.data_ptr(),
            next_ssm.data_ptr(),
        )
        return results

    step.memory = address  # type: ignore[attr-defined]  # lives as long as the step
    return step


def feed_forward(weights: FeedForwardWeights, num_rows: int, hidden_dtype: torch.dtype) -> Callable[..., Any] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    w, address, router = weights, Addresses(), weights.router
    if w.activation not in ACTIVATIONS or not can_run(num_rows, [w.up_proj, w.down_proj], [w.norm], []):
        return None
    matrix = bias = 0
    if router is not None:
        if router.weight.dtype not in FLOATS or not router.weight.is_contiguous():
            return None
        matrix, _, bias = address.projection(Projection(router.weight, None, router.bias))
    hidden_size, inner_size = w.down_proj.weight.shape[-2:]
    experts, top_k = (0, 1) if router is None else (router.weight.shape[0], router.top_k)
    groups = 1 if router is None else num_rows * top_k
    gated = w.activation in GATED
    up_block, down_block = rows_per_item(w.up_proj.weight), rows_per_item(w.down_proj.weight)
    up_block = up_block // 2 if gated and up_block > 1 else up_block  # an item reads gate and up
    num_items = num_rows + groups * num_blocks(inner_size, up_block) + num_blocks(hidden_size, down_block)
    sizes = (num_rows * hidden_size, num_rows * experts, 2 * num_rows * top_k, num_rows * top_k)
    inner = max(num_rows, groups) * inner_size
    call = _feed_forward.prepare(
        num_items,
        workers_for(w.up_proj, num_items),
        2,
        *address.scratch(*sizes, inner, inner, groups * hidden_size, num_rows * hidden_size),
        address.of(w.norm),
        matrix,
        bias,
        *address.projection(w.up_proj),
        *address.projection(w.down_proj),
        *(num_rows, hidden_size, inner_size, experts, top_k, up_block, down_block),
        hidden_dtype is BF16,
        w.norm.dtype is BF16,
        0 if router is None else KINDS[router.weight.dtype],
        router is not None and router.score_function == "sigmoid",
        router is not None and router.renormalize,
        gated,
        ACTIVATIONS[w.activation],
        KINDS[w.up_proj.weight.dtype],
        w.up_proj.weight.element_size(),
        w.norm_epsilon,
    )

    def step(hidden: Tensor) -> Tensor:
        hidden = expect("hidden", hidden, (num_rows, hidden_size), hidden_dtype)
        y = torch.empty_like(hidden)
        call(hidden.data_ptr(), y.data_ptr())
        return y

    step.memory = address  # type: ignore[attr-defined]  # lives as long as the step
    return step
