"""Mamba-1 blocks that stand one after the other as one step: how `stack.cu` is compiled, and what it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.decode_step import many_stack
from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.multiply import HALVES
from statespan.ops.decode_step.project import FEW_ROWS, TYPES, aligned, parameters_fit
from statespan.ops.decode_step.weights import Mamba1Weights
from statespan.ops.gpu import multiprocessors, shared_memory

WARPS, STATES = 8, 16
STEP = 256  # inputs that a warp takes at once
MOST_CHUNK = 1280  # inputs whose numbers a warp keeps in registers
LEAST_DEPTH, MOST_DEPTH = 3, 16  # of a warp's ring
LAYER_BYTES = 8 * 12  # of its addresses

States = tuple[Tensor, Tensor]  # conv [b k-1 d] and ssm [b d n]


def mamba1_stack(
    weights: Sequence[Mamba1Weights], states: Sequence[States], hidden_dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare_stack`."""
    first, rows, conv_dtype = weights[0], len(states[0][0]), states[0][0].dtype
    alike = all(_like(one, first) for one in weights) and all(_states_of(rows, *pair, first) for pair in states)
    if rows > FEW_ROWS and alike and all(many_stack.takes(one, hidden_dtype, conv_dtype) for one in weights):
        return many_stack.ManyStack(weights, states, rows, hidden_dtype)
    plan = Plan.of(weights, hidden_dtype) if rows == 1 and alike and all(map(_plain, weights)) else None
    return None if plan is None else Stack(plan, weights, states, hidden_dtype)


@dataclass(frozen=True)
class Plan:
    """Sizes, and how they are divided over blocks, warps and the rings of the warps."""

    hidden: int
    inner: int
    rank: int
    layers: int
    blocks: int
    chunk: int  # inputs of a unit of work, which has two outputs
    depth: int  # units of a ring
    fixed_bytes: int  # of shared memory, besides the rings

    @staticmethod
    def of(weights: Sequence[Mamba1Weights], hidden_dtype: torch.dtype) -> "Plan | None":
        """None where the kernel is not made for these sizes or this GPU."""
        first = weights[0]
        device, (hidden, inner) = first.norm.device, first.out_proj.weight.shape
        rank, blocks = first.dt_proj.weight.shape[1], multiprocessors(device)
        chunks = [hidden // n for n in (1, 2, 4, 8) if hidden % (n * STEP) == 0 and hidden // n <= MOST_CHUNK]
        chunks = [c for c in chunks if inner % c == 0 and WARPS % (inner // c) == 0]
        channels, places = -(-inner // blocks), -(-hidden // 2 // blocks)
        roomy = 4 * channels <= 32 * WARPS and 2 * places <= 32 * WARPS and min(inner, hidden // 2) >= blocks
        new = torch.cuda.get_device_capability(device) >= (9, 0)
        if not chunks or not roomy or rank % 8 or hidden_dtype not in TYPES or not new:
            return None
        chunk, selection = chunks[0], rank + 2 * STATES
        units = max(channels * hidden // chunk, max(places, -(-selection // 2 // blocks)) * (inner // chunk))
        numbers = inner + 2 * units + selection + 2 * channels + WARPS
        fixed = 4 * numbers + 8 * WARPS * MOST_DEPTH + LAYER_BYTES * len(weights) + 256
        depth = min(MOST_DEPTH, (shared_memory(device) - fixed) // (WARPS * 4 * chunk))
        return Plan(hidden, inner, rank, len(weights), blocks, chunk, depth, fixed) if depth >= LEAST_DEPTH else None

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.fixed_bytes + self.depth * WARPS * 4 * self.chunk


class Stack:
    """One row through the blocks, in place: see stack.cu."""

    def __init__(
        self, plan: Plan, weights: Sequence[Mamba1Weights], states: Sequence[States], hidden_dtype: torch.dtype
    ) -> None:
        first, device = weights[0], weights[0].norm.device
        macros: dict[str, str | int] = {
            **{"W": TYPES[first.in_proj.weight.dtype], "H": TYPES[hidden_dtype], "P": TYPES[first.norm.dtype]},
            **{"S": TYPES[states[0][0].dtype], "TAPS": first.conv_weight.shape[1]},
            **{"HIDDEN": plan.hidden, "INNER": plan.inner, "RANK": plan.rank, "LAYERS": plan.layers},
            **{"BLOCKS": plan.blocks, "CHUNK": plan.chunk, "DEPTH": plan.depth, "SHARED": plan.shared_bytes},
            "EPSILON": f"{first.norm_epsilon:.9e}f",
            "DISCRETIZATION": DISCRETIZATIONS[first.discretization],
        }
        self._held = weights, states  # the kernel knows only where they are
        self._layers = torch.tensor(
            [_addresses(one, *pair) for one, pair in zip(weights, states, strict=True)], dtype=torch.int64
        ).to(device)
        sizes = (plan.inner, plan.rank + 2 * STATES, plan.inner, plan.hidden)
        self._published = [torch.zeros(size, 2, dtype=torch.int32, device=device) for size in sizes]
        self._epoch = torch.zeros(1, dtype=torch.int32, device=device)
        grid = (plan.blocks, 1)
        self._launch = Launch("stack", device, grid, 32 * WARPS, macros, plan.shared_bytes, cooperative=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The residual stream [1 h] after the blocks, where it was; the states are overwritten."""
        self._launch(self._layers, hidden, *self._published, self._epoch)
        return hidden


def _addresses(w: Mamba1Weights, conv_state: Tensor, ssm_state: Tensor) -> list[int]:
    """In the order of stack.cu's Layer."""
    before = (w.norm, w.in_proj.weight, w.conv_weight, w.conv_bias, w.x_proj.weight, w.dt_proj.weight)
    after = (w.dt_bias, w.A_log, w.D, w.out_proj.weight, conv_state, ssm_state)
    return [0 if tensor is None else tensor.data_ptr() for tensor in (*before, *after)]


def _plain(w: Mamba1Weights) -> bool:
    """Whether the kernel can read the weights: 16 bits, without gaps, nothing but products."""
    projections = (w.in_proj, w.x_proj, w.dt_proj, w.out_proj)
    return (
        all(p.plain and p.scale is None and p.bias is None and aligned(p) for p in projections)
        and {p.weight.dtype for p in projections} <= {w.in_proj.weight.dtype}
        and w.in_proj.weight.dtype in HALVES
        and parameters_fit((w.norm, w.conv_weight, w.conv_bias), (w.dt_bias, w.A_log, w.D))
        and w.A_log.shape[1] == STATES
        and not w.inner_norms
    )


def _like(w: Mamba1Weights, first: Mamba1Weights) -> bool:
    """Whether a block is built as the first one."""

    def kind(w: Mamba1Weights) -> tuple[object, ...]:
        matrices = [projection.weight for projection in (w.in_proj, w.x_proj, w.dt_proj, w.out_proj)]
        tensors = (w.norm, w.conv_weight, w.A_log, *matrices)
        return (w.norm_epsilon, w.discretization, *((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors))

    return kind(w) == kind(first)


def _states_of(rows: int, conv_state: Tensor, ssm_state: Tensor, w: Mamba1Weights) -> bool:
    """Whether these are the states of so many rows, without gaps."""
    shapes = (rows, w.conv_weight.shape[1] - 1, w.conv_weight.shape[0]), (rows, *w.A_log.shape)
    there = conv_state.is_contiguous() and ssm_state.is_contiguous() and ssm_state.dtype == torch.float32
    return there and (conv_state.shape, ssm_state.shape) == shapes and conv_state.dtype in TYPES
