# pyright: reportCallIssue=false
# A launch takes options, num_warps, that are no parameters of the kernel.
"""Where the choices' rows go on a GPU: tensors to the kernels of `triton_routing_kernels.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.grouped_mlp import triton_routing_kernels as kernels
from statespan.ops.triton_kernels import power_of_two

SORT_VALUES = 1 << 14  # of a block's one-hot matrix [choices experts]
SORT_PROGRAMS = 128


@dataclass(frozen=True)
class Sorted:
    """Choices sorted by expert, on the device.

    Attributes:
        order: [t k], int32. The choice at each place; undefined behind the last expert's end.
        place: [t k], int32. The place of each choice, -1 where no expert serves it.
        ends: [e], int32. Where each expert's places end.
    """

    order: Tensor
    place: Tensor
    ends: Tensor


def sort(expert_index: Tensor, num_experts: int) -> Sorted:
    """Stable: the choices of an expert stay in order."""
    choices, bins = expert_index.numel(), power_of_two(num_experts)
    block = max(16, min(256, SORT_VALUES // bins))
    blocks = -(-choices // block)
    blocks_each = -(-blocks // SORT_PROGRAMS)
    programs = -(-blocks // blocks_each)
    order, place = (torch.empty(choices, dtype=torch.int32, device=expert_index.device) for _ in range(2))
    counts, ends = order.new_empty(programs, bins), order.new_empty(num_experts)
    kernels.count[(programs,)](expert_index, counts, choices, blocks_each, EXPERTS=bins, BLOCK=block, num_warps=8)
    kernels.sort[(programs,)](
        expert_index,
        counts,
        order,
        place,
        ends,
        choices,
        num_experts,
        blocks_each,
        programs,
        EXPERTS=bins,
        BLOCK=block,
        num_warps=8,
    )
    return Sorted(order, place, ends)


def gather(x: Tensor, places: Sorted, top_k: int) -> Tensor:
    """The tokens' rows at their choices' places: a step of the products then need not look up where they are."""
    rows = x.new_empty(len(places.order), x.shape[1])
    kernels.gather[(len(rows),)](
        x,
        places.order,
        places.ends,
        rows,
        len(places.ends),
        x.shape[1],
        top_k,
        x.stride(0),
        BLOCK=min(1024, power_of_two(x.shape[1])),
        num_warps=4,
    )
    return rows


def aligned(rows: Tensor) -> Tensor:
    """The rows, copied unless each starts at a multiple of 16 values and bytes: kernels load 16 bytes at once."""
    if rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def combine(
    rows: Tensor, place: Tensor | None, expert_index: Tensor, weight: Tensor | None, num_experts: int, y: Tensor
) -> None:
    """The weighted sum [t h] of the choices' rows [.. t k h], at `place` where they are sorted."""
    tokens, hidden_size = y.shape
    block = min(1024, power_of_two(hidden_size))
    kernels.combine[(tokens, -(-hidden_size // block))](
        rows,
        place,
        expert_index,
        weight,
        y,
        expert_index.numel(),
        num_experts,
        hidden_size,
        *((0, 0) if weight is None else weight.stride()),
        rows.shape[0] if rows.dim() == 3 else 1,
        TOP_K=expert_index.shape[1],
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
