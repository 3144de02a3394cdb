"""Where the choices' rows go on a GPU: tensors to the kernels of `triton_routing_kernels.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.grouped_mlp import triton_routing_kernels as kernels
from statespan.ops.triton_kernels import power_of_two
from statespan.ops.triton_kernels.launcher import start

SORT_VALUES = 1 << 13  # of a block's one-hot matrix [choices experts]
SORT_PROGRAMS = 128


@dataclass(frozen=True)
class Sorted:
    """Choices sorted by expert, on the device.

    Attributes:
        order: [places], int32. The choice at each place, -1 between experts; undefined behind the last one's.
        ends: [e], int32. Where each expert's places end.
        align: where they begin: at its multiples.
        shifts: [e], int32. How much further back an expert's places lie than with align = 1.
    """

    order: Tensor
    ends: Tensor
    align: int
    shifts: Tensor


def sort(expert_index: Tensor, num_experts: int, align: int = 1) -> Sorted:
    """Stable: the choices of an expert stay in order."""
    choices, bins = expert_index.numel(), power_of_two(num_experts)
    block = max(16, min(256, SORT_VALUES // bins))
    blocks = -(-choices // block)
    blocks_each = -(-blocks // SORT_PROGRAMS)
    programs = -(-blocks // blocks_each)
    places = choices + min(choices, num_experts) * (align - 1)
    order = torch.empty(places, dtype=torch.int32, device=expert_index.device)
    counts, (ends, shifts) = order.new_empty(programs, bins), order.new_empty(2, num_experts)
    start(
        kernels.count, (programs,), expert_index, counts, choices, blocks_each, EXPERTS=bins, BLOCK=block, num_warps=8
    )
    start(
        kernels.sort,
        (programs,),
        expert_index,
        counts,
        order,
        ends,
        shifts,
        choices,
        num_experts,
        blocks_each,
        programs,
        EXPERTS=bins,
        BLOCK=block,
        ALIGN=align,
        num_warps=8,
    )
    return Sorted(order, ends, align, shifts)


def gather(x: Tensor, places: Sorted, top_k: int) -> Tensor:
    """The tokens' rows at their choices' places: a step of the products then need not look up where they are."""
    rows = x.new_empty(len(places.order), x.shape[1])
    start(
        kernels.gather,
        (len(rows),),
        x,
        places.order,
        places.ends,
        rows,
        len(places.ends),
        x.shape[1],
        top_k,
        x.stride(0),
        BLOCK=min(1024, power_of_two(x.shape[1])),
        ALIGN=places.align,
        num_warps=4,
    )
    return rows


def aligned(rows: Tensor) -> Tensor:
    """The rows, copied unless each starts at a multiple of 16 values and bytes: kernels load 16 bytes at once."""
    if rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def combine(rows: Tensor, expert_index: Tensor, weight: Tensor | None, num_experts: int, y: Tensor) -> None:
    """The weighted sum [t h] of the choices' rows [.. t k h]."""
    tokens, hidden_size = y.shape
    block = min(1024, power_of_two(hidden_size))
    start(
        kernels.combine,
        (tokens, -(-hidden_size // block)),
        rows,
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


def fill_unserved(expert_index: Tensor, num_experts: int, y: Tensor) -> None:
    """The tokens of y [t h] that no expert serves, of one choice each [t 1]: zeros, or NaN for an unknown expert."""
    tokens, hidden_size = y.shape
    start(kernels.fill_unserved, (-(-tokens // 64),),
        expert_index, y, tokens, num_experts, hidden_size,
        TOKENS=64, BLOCK=min(64, power_of_two(hidden_size)), num_warps=4,
    )  # fmt: skip
