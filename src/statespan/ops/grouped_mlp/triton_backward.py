# pyright: reportCallIssue=false
# A launch takes options, num_warps, that are no parameters of the kernel.
"""The backward of the experts' MLPs on GPUs. Nothing waits for the device."""

import torch
from torch import Tensor

from statespan.ops.activation import GATED
from statespan.ops.grouped_mlp import triton_backward_kernels as kernels
from statespan.ops.grouped_mlp.experts import Experts
from statespan.ops.grouped_mlp.triton_backend import GROUP, product_tile, products
from statespan.ops.grouped_mlp.triton_routing import Sorted, aligned, combine, gather, sort
from statespan.ops.layout import contiguous
from statespan.ops.triton_kernels import on, power_of_two


def backward(
    grad_y: Tensor,
    kept: Tensor,
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    experts: Experts,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, expert_weight and the experts' parameters; None where there is no bias."""
    up_proj, down_proj = experts.up_proj, experts.down_proj
    grad_x, grad_weight = x.new_empty(x.shape), expert_weight.new_zeros(expert_weight.shape, dtype=torch.float32)
    grad_up, grad_down = (proj.new_empty(proj.shape) for proj in (up_proj, down_proj))
    biases = [None if bias is None else bias.new_empty(bias.shape) for bias in (experts.up_bias, experts.down_bias)]
    found = (grad_x, grad_weight, grad_up, grad_down, *biases)
    if expert_index.numel() == 0 or x.numel() == 0:
        return tuple(None if value is None else value.zero_() for value in found)
    x, grad_y, expert_index = aligned(x), aligned(grad_y), expert_index.contiguous()
    top_k = expert_index.shape[1]
    with on(x.device):
        places = sort(expert_index, down_proj.shape[0])
        rows, grad_rows = (gather(value, places, top_k) for value in (x, grad_y))
        grad_hidden = x.new_empty(expert_index.numel(), down_proj.shape[2])
        products(grad_rows, down_proj.mT, None, None, expert_index, places, grad_hidden)
        grad_inner, hidden = torch.empty_like(kept), torch.empty_like(grad_hidden)
        _through_activation(
            grad_hidden, kept, grad_rows, experts.down_bias, expert_index, expert_weight, places, activation,
            grad_inner, hidden, grad_weight,
        )  # fmt: skip
        del grad_hidden
        _weight_gradients(grad_rows, hidden, places, grad_down)
        _weight_gradients(grad_inner, rows, places, grad_up)
        products(grad_inner, up_proj.mT, None, None, expert_index, places, rows, scatter=True)
        combine(rows, None, expert_index, None, down_proj.shape[0], grad_x)
        if biases[0] is not None:
            _bias_gradients(grad_inner, None, places, top_k, biases[0])
        if biases[1] is not None:
            _bias_gradients(grad_rows, expert_weight, places, top_k, biases[1])
    return (grad_x, grad_weight.to(expert_weight.dtype), *found[2:])


def _through_activation(
    grad_hidden: Tensor,
    kept: Tensor,
    grad_rows: Tensor,
    down_bias: Tensor | None,
    expert_index: Tensor,
    expert_weight: Tensor,
    places: Sorted,
    activation: str,
    grad_inner: Tensor,
    hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    inner_size = hidden.shape[1]
    kernels.activation_gradients[(len(hidden),)](
        grad_hidden,
        kept,
        grad_rows,
        contiguous(down_bias),
        expert_index,
        expert_weight,
        places.order,
        places.ends,
        grad_inner,
        hidden,
        grad_weight,
        len(places.ends),
        inner_size,
        grad_rows.shape[1],
        expert_index.shape[1],
        *expert_weight.stride(),
        ACTIVATION=activation,
        GATED=activation in GATED,
        BLOCK=min(1024, power_of_two(inner_size)),
        num_warps=4,
    )


def _weight_gradients(left: Tensor, right: Tensor, places: Sorted, y: Tensor) -> None:
    """y [e left right]: the sums over each expert's rows of left^T right."""
    tile = product_tile(left, y, len(left))
    blocks = -(-left.shape[1] // tile.rows) * -(-right.shape[1] // tile.weights)
    kernels.weight_gradients[(blocks, len(places.ends))](
        left,
        right,
        places.ends,
        y,
        left.shape[1],
        right.shape[1],
        LEFT=tile.rows,
        RIGHT=tile.weights,
        ROWS=tile.inputs,
        GROUP=GROUP,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def _bias_gradients(rows: Tensor, expert_weight: Tensor | None, places: Sorted, top_k: int, y: Tensor) -> None:
    columns = y.shape[1]
    block = min(128, power_of_two(columns))
    kernels.bias_gradients[(-(-columns // block), len(y))](
        rows,
        expert_weight,
        places.order,
        places.ends,
        y,
        columns,
        top_k,
        *((0, 0) if expert_weight is None else expert_weight.stride()),
        ROWS=32,
        COLUMNS=block,
        num_warps=4,
    )
