"""Gradients of the chunked SSD on GPUs, by the kernels of `triton_kernels_backward.py`."""

import torch
from torch import Tensor

from statespan.ops.layout import near
from statespan.ops.ssd import triton_kernels_backward as kernels
from statespan.ops.ssd.triton_forward import states_kept
from statespan.ops.ssd.triton_plan import Plan
from statespan.ops.triton_kernels.launcher import launch

# What the assembler is to give a thread; for sm_80 it may choose 32 and spill thousands of bytes.
MOST_REGISTERS = {"maxnreg": 255} if torch.version.hip is None else {}


def gradients(
    plan: Plan, grad_y: Tensor, grad_final: Tensor, into: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state, as `chunked.backward` gives them."""
    grad_y = near(grad_y)
    kept, _ = states_kept(plan, plan.x, plan.B, plan.initial_state, reverse=False)
    grad_kept, first = states_kept(plan, grad_y, plan.C, plan.tiles(grad_final), reverse=True)
    into_x, into_dt, into_B, into_C = into  # where those of x, dt, B and C go; their last dimensions are contiguous
    grad_D, sums, grad_scores = _grad_x(plan, grad_y, kept, grad_kept, into_x)
    _grad_columns(plan, plan.x, plan.C, grad_kept, grad_scores, into_B, reverse=False)
    _grad_columns(plan, grad_y, plan.B, kept, grad_scores, into_C, reverse=True)
    del kept, grad_kept, grad_scores
    grad_A, grad_bias, *skip = _grad_steps(plan, sums, into_dt)
    grad_D = skip[0] if skip else grad_D
    return (
        into_x,
        into_dt,
        grad_A.sum(0),
        into_B,
        into_C,
        None if grad_D is None else grad_D.sum(0),
        None if plan.dt_bias is None else grad_bias.sum(0),
        None if plan.initial_state is None or first is None else plan.whole(first),
    )


def _grad_x(
    plan: Plan, grad_y: Tensor, kept: Tensor, grad_kept: Tensor, grad_x: Tensor
) -> tuple[Tensor | None, tuple[Tensor, Tensor], Tensor]:
    """Each chunk's part of D's gradient where D is [h p], the sums for dt's, the gradient of B C^T in parts."""
    parts, share = plan.shares()
    programs = plan.batch * plan.chunks * plan.groups
    grad_scores = plan.x.new_empty(parts, programs, plan.chunk, plan.chunk)
    each_place = plan.D is not None and plan.D.dim() == 2
    grad_D = plan.floats(plan.batch * plan.chunks, plan.heads, plan.dims) if each_place else None
    sums = (
        plan.floats(4 if plan.D is None or each_place else 5, plan.lanes, plan.chunks * plan.chunk),
        plan.floats(plan.lanes, plan.chunks),
    )
    launch(
        kernels.gradients,
        (programs, parts),
        grad_y,
        plan.x,
        plan.B,
        plan.C,
        plan.D,
        *plan.of_tokens,
        kept,
        grad_kept,
        grad_x,
        grad_scores,
        grad_D,
        *sums,
        plan.length,
        plan.chunks,
        plan.heads,
        plan.group_heads,
        share,
        *grad_y.stride()[:3],
        *plan.x.stride()[:3],
        *plan.B.stride()[:3],
        *plan.C.stride()[:3],
        *grad_x.stride()[:3],
        *plan.skip_strides,
        **plan.tile_options(plan.sizes.gradients),
        **MOST_REGISTERS,
    )
    return grad_D, sums, grad_scores


def _grad_columns(
    plan: Plan, x: Tensor, C: Tensor, kept: Tensor, grad_scores: Tensor, into: Tensor, *, reverse: bool
) -> None:
    """The gradient of B or, with the roles of both sides exchanged and reverse, of C."""
    parts, share = plan.shares()
    grad = into[None] if parts == 1 else plan.floats(parts, *into.shape)
    programs = plan.batch * plan.chunks * plan.groups
    launch(
        kernels.gradients_of_columns,
        (programs, parts, plan.block_n // plan.part_n),
        x,
        C,
        *plan.of_tokens,
        kept,
        grad_scores,
        grad,
        plan.length,
        plan.chunks,
        grad_scores.shape[0],
        plan.heads,
        plan.group_heads,
        share,
        *x.stride()[:3],
        *C.stride()[:3],
        *grad.stride()[:4],
        REVERSE=reverse,
        PART_N=plan.part_n,
        **plan.tile_options(plan.sizes.columns),
    )
    if parts > 1:
        into.copy_(grad.sum(0))


def _grad_steps(plan: Plan, sums: tuple[Tensor, Tensor], grad_dt: Tensor) -> tuple[Tensor, ...]:
    """The gradient of dt in its place; each chunk's part of those of A, dt_bias and, where it is [h], of D."""
    grad_A, grad_bias, *skip = plan.floats(len(sums[0]) - 2, plan.batch * plan.chunks, plan.heads)
    launch(
        kernels.steps_backward,
        plan.step_grid,
        *sums,
        plan.dt,
        plan.A,
        plan.dt_bias,
        plan.marks,
        grad_dt,
        grad_A,
        grad_bias,
        skip[0] if skip else None,
        *plan.step_arguments,
        *grad_dt.stride()[:2],
        **plan.step_options,
        BLOCKS=plan.blocks,
    )
    return grad_A, grad_bias, *skip
