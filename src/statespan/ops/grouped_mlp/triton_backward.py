"""The backward of the experts' MLPs on GPUs. Nothing waits for the device."""

import torch
from torch import Tensor

from statespan.ops.activation import GATED
from statespan.ops.grouped_mlp import triton_backward_kernels as kernels
from statespan.ops.grouped_mlp import triton_many as many
from statespan.ops.grouped_mlp.experts import Experts
from statespan.ops.grouped_mlp.triton_backend import GROUP, product_tile, products
from statespan.ops.grouped_mlp.triton_routing import Sorted, aligned, combine, gather, sort
from statespan.ops.layout import contiguous
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import start

ALIGN = 64  # rows of a step of the sums over rows at the most: an expert's places begin at a multiple


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
    top_k, (num_experts, hidden_size, inner_size) = expert_index.shape[1], down_proj.shape
    with on(x.device):
        places = sort(expert_index, num_experts, ALIGN)
        rows, grad_rows = (gather(value, places, top_k) for value in (x, grad_y))
        grad_hidden = x.new_empty(len(rows), inner_size)
        grad_inner, hidden = x.new_empty(len(rows), kept.shape[1]), torch.empty_like(grad_hidden)
        described = many.serves(x, (up_proj, down_proj), expert_index.numel())
        tiles = many.schedule(places, expert_index.numel(), inner_size, hidden_size) if described else None
        if tiles is not None:
            many.products(grad_rows, down_proj.mT, None, None, tiles, 0, grad_hidden)
        else:
            products(grad_rows, down_proj.mT, None, None, expert_index, places, grad_hidden)
        _through_activation(
            grad_hidden, kept, grad_rows, experts.down_bias, expert_index, expert_weight, places, activation,
            grad_inner, hidden, grad_weight,
        )  # fmt: skip
        del grad_hidden
        sums = _weight_gradients if tiles is None else many.weight_gradients
        sums(grad_rows, hidden, places, grad_down)
        sums(grad_inner, rows, places, grad_up)
        rows = rows[: expert_index.numel()]  # of the choices from now on
        if tiles is not None:
            many.products(grad_inner, up_proj.mT, None, None, tiles, 1, rows, order=places.order)
        else:
            products(grad_inner, up_proj.mT, None, None, expert_index, places, rows, scatter=True)
        combine(rows, expert_index, None, num_experts, grad_x)
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
    start(
        kernels.activation_gradients,
        (len(hidden),),
        grad_hidden,
        kept,
        grad_rows,
        contiguous(down_bias),
        expert_index,
        expert_weight,
        places.order,
        places.ends,
        places.shifts,
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
        ALIGN=places.align,
        num_warps=4,
    )


def _weight_gradients(left: Tensor, right: Tensor, places: Sorted, y: Tensor) -> None:
    """y [e left right]: the sums over each expert's rows of left^T right."""
    tile = product_tile(left, y, len(left), len(left))
    blocks = -(-left.shape[1] // tile.rows) * -(-right.shape[1] // tile.weights)
    start(
        kernels.weight_gradients,
        (blocks, len(places.ends)),
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
        ALIGN=places.align,
        num_warps=tile.warps,
    )


def _bias_gradients(rows: Tensor, expert_weight: Tensor | None, places: Sorted, top_k: int, y: Tensor) -> None:
    columns = y.shape[1]
    block = min(128, power_of_two(columns))
    start(
        kernels.bias_gradients,
        (-(-columns // block), len(y)),
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
        ALIGN=places.align,
        num_warps=4,
    )
