"""Experts' MLPs on GPUs: tensors to the kernels of `triton_kernels.py`. Nothing waits for the device."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statespan.ops.activation import GATED
from statespan.ops.gpu import multiprocessors, shared_memory
from statespan.ops.grouped_mlp import triton_kernels as kernels
from statespan.ops.grouped_mlp import triton_many as many
from statespan.ops.grouped_mlp.experts import Experts
from statespan.ops.grouped_mlp.triton_routing import Sorted, aligned, combine, fill_unserved, gather, sort
from statespan.ops.layout import contiguous
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import start
from statespan.ops.tuning import Tunable

LONG = 4096  # inputs from which int8 weights have rows of their own in the tuning table
FITTING = 56  # rows on average of which most experts have at most 64; int8 weights are widened again for each tile
FEW = 128  # choices up to here need no sorting: each program looks through all
PRODUCT_SHARED = 200 << 10
GROUP = 16  # most blocks of rows that go through the same weights side by side


@dataclass(frozen=True)
class Tile:
    """Sizes of a program: weights' rows (of a gated product half of them gate) x rows x inputs a step, steps, warps."""

    weights: int
    rows: int
    inputs: int
    stages: int
    warps: int

    def fitted(self, item_bytes: int, device: torch.device) -> "Tile":
        """With fewer inputs and steps where the shared memory is smaller."""
        tile, limit = self, shared_memory(device)
        step = (self.weights + self.rows) * item_bytes
        while tile.stages * tile.inputs * step > limit and tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        while tile.stages * tile.inputs * step > limit and tile.inputs > 16:
            tile = replace(tile, inputs=tile.inputs // 2)
        return tile


PRODUCT = Tile(256, 128, 64, 4, 8)  # matrix-bound
PRODUCT_REGISTERS = Tile(128, 128, 32, 3, 8)  # where operands go through registers: before and beside Hopper
PRECISE = Tile(32, 32, 32, 2, 4)  # float32 has no matrix units
UNALIGNED = Tile(32, 32, 32, 2, 4)  # loads of single values: larger tiles compile for minutes


def forward(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, experts: Experts, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """[t h] of `statespan.ops.grouped_mlp`, and what the backward needs: the inner rows before the activation."""
    num_experts, hidden_size, inner_size = experts.down_proj.shape
    choices = expert_index.numel()
    y = x.new_empty(x.shape)
    if y.numel() == 0 or choices == 0:
        return y.zero_(), x.new_zeros(choices if keep else 0, experts.up_proj.shape[1])
    x, expert_index = aligned(x), expert_index.contiguous()
    with on(x.device):
        if choices <= FEW and not keep:
            _few_rows(x, expert_index, expert_weight, experts, activation, y)
            return y, x.new_empty(0, experts.up_proj.shape[1])
        places = sort(expert_index, num_experts)
        kept = x.new_empty(choices if keep else 0, experts.up_proj.shape[1])
        inner = x.new_empty(choices, inner_size)
        each = choices // num_experts
        if many.serves(x, (experts.up_proj, experts.down_proj), choices):
            _many_rows(x, expert_index, expert_weight, experts, activation, places, inner, kept if keep else None, y)
            return y, kept
        products(
            x, many.widened(experts.up_proj, x, each), experts.up_bias, experts.up_scale, expert_index, places, inner,
            activation, kept=kept if keep else None, share=expert_index.shape[1], gather=True,
        )  # fmt: skip
        rows = x.new_empty(choices, hidden_size)
        products(
            inner, many.widened(experts.down_proj, x, each), experts.down_bias, experts.down_scale, expert_index,
            places, rows, scatter=True,
        )  # fmt: skip
        combine(rows, expert_index, expert_weight, num_experts, y)
    return y, kept


def _few_rows(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, experts: Experts, activation: str, y: Tensor
) -> None:
    """`forward` without sorting."""
    choices, top_k, num_experts = expert_index.numel(), expert_index.shape[1], len(experts.down_proj)
    inner = x.new_empty(choices, experts.down_proj.shape[2])
    products(
        x, experts.up_proj, experts.up_bias, experts.up_scale, expert_index, None, inner, activation, share=top_k,
    )  # fmt: skip
    down = inner, experts.down_proj, experts.down_bias, experts.down_scale, expert_index, None
    splits = _splits(choices, top_k, x, experts.down_proj)
    if splits == 1 == top_k:
        products(*down, y, factors=expert_weight)
        return
    rows = x.new_empty(splits, choices, x.shape[1], dtype=torch.float32 if splits > 1 else x.dtype)
    products(*down, rows)
    combine(rows, expert_index, expert_weight, num_experts, y)


def _many_rows(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    experts: Experts,
    activation: str,
    places: Sorted,
    inner: Tensor,
    kept: Tensor | None,
    y: Tensor,
) -> None:
    """`forward` where tiles come by descriptors."""
    choices, top_k, (num_experts, hidden_size, _) = len(inner), expert_index.shape[1], experts.down_proj.shape
    tiles, each = many.schedule(places, choices, experts.up_proj.shape[1], hidden_size), choices // num_experts
    many.products(
        gather(x, places, top_k), many.widened(experts.up_proj, x, each), experts.up_scale, experts.up_bias, tiles, 0,
        inner, activation, kept=kept,
    )  # fmt: skip
    rows = y if top_k == 1 else x.new_empty(choices, hidden_size)
    many.products(
        inner, many.widened(experts.down_proj, x, each), experts.down_scale, experts.down_bias, tiles, 1, rows,
        order=places.order, factors=expert_weight if top_k == 1 else None,
    )  # fmt: skip
    if top_k == 1:
        fill_unserved(expert_index, num_experts, y)
    else:
        combine(rows, expert_index, expert_weight, num_experts, y)


def _stream(weight: Tensor, rows: int, size: int) -> Tile:
    """Sizes for so many rows a tile, where the weights are what takes the time."""
    int8 = STREAM_INT8 if weight.shape[2] >= LONG else STREAM_INT8_SHORT
    return Tile(rows=rows, **(int8 if weight.dtype == torch.int8 else STREAM).best(weight.device, size))


def _splits(choices: int, top_k: int, x: Tensor, weight: Tensor) -> int:
    """Parts of the inputs of a few rows' products, so that every multiprocessor has two programs.

    With one choice a token, one program on most of them is enough: nothing has to be added up then.
    """
    num_experts, outputs, inputs = weight.shape
    tile = product_tile(x, weight, -(-choices // num_experts), choices)
    programs = min(choices, num_experts) * -(-outputs // tile.weights)
    if top_k == 1 and 2 * programs >= multiprocessors(weight.device):
        return 1
    return max(1, min(8, 2 * multiprocessors(weight.device) // programs, inputs // (4 * tile.inputs)))


def product_tile(x: Tensor, weight: Tensor, rows: int, choices: int) -> Tile:
    """Sizes for so many rows [inputs] an expert on average, of so many in all, and the weights [e outputs inputs]."""
    int8 = weight.dtype == torch.int8
    if any(size % 16 for size in weight.shape[1:]) or weight.data_ptr() % 16:
        tile = UNALIGNED
    elif x.dtype == torch.float32:
        tile = PRECISE
    elif rows <= 96 or int8:
        tallest = 128 if int8 and rows > FITTING else 64
        height = max(16, min(tallest, power_of_two(2 * rows)))
        tile = _stream(weight, height, min(height, choices))
    else:
        tile = PRODUCT if shared_memory(x.device) >= PRODUCT_SHARED else PRODUCT_REGISTERS
    return tile.fitted(x.element_size(), x.device)


def products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    expert_index: Tensor,
    places: Sorted | None,
    y: Tensor,
    activation: str = "none",
    *,
    kept: Tensor | None = None,
    factors: Tensor | None = None,
    share: int = 1,
    gather: bool = False,
    scatter: bool = False,
) -> Tensor:
    """y [.. choices outputs] of rows of x: weight [e outputs inputs] (gated: 2 outputs), of any strides.

    With factors [choices 1], each row times its own; for choices that are not sorted.
    """
    gated = activation in GATED
    choices, (num_experts, _, inputs), outputs = expert_index.numel(), weight.shape, y.shape[-1]
    splits = y.shape[0] if y.dim() == 3 else 1
    tile = product_tile(x, weight, -(-choices // num_experts), choices)
    block = tile.weights // 2 if gated else tile.weights
    blocks = -(-outputs // block)
    if places is None:
        grid = (blocks, min(choices, num_experts), splits)
    else:
        grid = ((choices // tile.rows + min(choices, num_experts)) * blocks, 1, splits)
    start(
        kernels.products,
        grid,
        x,
        weight,
        contiguous(bias),
        contiguous(scale),
        expert_index if places is None else None,
        None if places is None else places.order,
        None if places is None else places.ends,
        factors,
        kept,
        y,
        choices,
        num_experts,
        inputs,
        outputs,
        x.stride(0),
        share,
        0 if factors is None else factors.stride(0),
        *weight.stride(),
        splits,
        ACTIVATION=activation,
        GATED=gated,
        BY_CHOICE=choices <= num_experts,
        GATHER=gather,
        SCATTER=scatter,
        CHOICES=max(tile.rows, power_of_two(choices)) if places is None else 0,
        EXPERTS=power_of_two(num_experts),
        GROUP=GROUP,
        ALIGN=1 if places is None else places.align,
        OUTPUTS=block,
        ROWS=tile.rows,
        INPUTS=tile.inputs,
        WIDE=tile.rows >= 64 and weight.dtype == x.dtype,
        EVEN=inputs % tile.inputs == 0,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return y


def _trial(dtype: torch.dtype, hidden: int) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, size: int) -> Callable[[], object]:
        """Choices for tiles of so many rows; fewer than 16 are all there are."""
        choices = 8 * size if size >= 16 else size
        x, index = (
            torch.randn(choices // 2, hidden, dtype=torch.bfloat16, device=device),
            (torch.arange(choices, device=device) % 16).view(-1, 2),
        )
        up = torch.randint(-99, 99, (16, 4 * hidden, hidden), dtype=torch.int8, device=device).to(dtype)
        down = torch.randint(-99, 99, (16, hidden, 2 * hidden), dtype=torch.int8, device=device).to(dtype)
        scales = [torch.rand(w.shape[:2], device=device) / 4096 if dtype == torch.int8 else None for w in (up, down)]
        experts = Experts(up, down, None, None, *scales)
        return lambda: forward(x, index, torch.ones(index.shape, device=device), experts, "swiglu", False)

    return trial


_TILES = {"weights": (32, 64, 128), "inputs": (128, 256), "stages": (3, 4)}
STREAM = Tunable("grouped_mlp.stream", (16, 32, 64), _trial(torch.bfloat16, 2048), **_TILES, warps=(4, 8))
# Two warps: where four share 16 rows, each value is widened twice.
_INT8 = _TILES | {"inputs": (64, 128, 256), "warps": (2, 4, 8)}
STREAM_INT8 = Tunable("grouped_mlp.stream_int8", (16, 32, 64, 128), _trial(torch.int8, LONG), **_INT8)
STREAM_INT8_SHORT = Tunable("grouped_mlp.stream_int8_short", (8, 16, 32, 64, 128), _trial(torch.int8, 1024), **_INT8)
TUNABLES = (STREAM, STREAM_INT8, STREAM_INT8_SHORT)
