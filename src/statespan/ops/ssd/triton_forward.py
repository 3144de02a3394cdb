"""The chunked SSD on GPUs: outputs, and the states (in reverse their gradients) that stand between chunks."""

from torch import Tensor

from statespan.ops.ssd import triton_kernels as kernels
from statespan.ops.ssd.triton_plan import Plan
from statespan.ops.triton_kernels.launcher import launch

CHAIN_BLOCK = 512  # values of the state of a program of `chain`


def outputs(plan: Plan) -> tuple[Tensor, Tensor]:
    """y [b t h p] and the final state [b h p n], float32."""
    starts = _starts(plan, plan.x, plan.B, plan.initial_state, reverse=False)
    parts, split = plan.splits()
    y = plan.x.new_empty(plan.x.shape)
    final = plan.floats(plan.lanes, *plan.tile)
    launch(
        kernels.outputs,
        (plan.lanes, parts),
        plan.x,
        plan.B,
        plan.C,
        plan.D,
        *plan.of_tokens,
        starts,
        y,
        final,
        plan.length,
        plan.chunks,
        split,
        plan.heads,
        plan.group_heads,
        *plan.x.stride()[:3],
        *plan.B.stride()[:3],
        *plan.C.stride()[:3],
        *plan.skip_strides,
        **plan.tile_options(plan.sizes.outputs),
    )
    return y, plan.whole(final)


def states_kept(
    plan: Plan, x: Tensor, B: Tensor, given: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor | None]:
    """The state before each chunk, in x.dtype, from `given` before the first; in reverse, with grad_y as x and C as B,
    the gradient of the state after each chunk, and that of the initial state."""
    starts = _starts(plan, x, B, given, reverse=reverse)
    parts, _ = plan.splits()
    kept = plan.x.new_empty(plan.lanes, plan.chunks, *plan.tile)
    ends = plan.floats(plan.lanes, parts, *plan.tile) if reverse else None
    _walk(plan, x, B, starts, kept, ends, None, reverse)
    return kept, None if ends is None else ends[:, 0].contiguous()


def _starts(plan: Plan, x: Tensor, B: Tensor, given: Tensor | None, *, reverse: bool) -> Tensor | None:
    """The states that the splits start from; `given` itself where there is but one split."""
    parts, _ = plan.splits()
    if parts == 1:
        return given
    starts, decays = plan.floats(plan.lanes, parts, *plan.tile), plan.floats(plan.lanes, parts)
    _walk(plan, x, B, None, None, starts, decays, reverse)
    size = plan.block_p * plan.block_n
    block = min(size, CHAIN_BLOCK)
    launch(
        kernels.chain,
        (plan.lanes, size // block),
        starts,
        decays,
        given,
        parts,
        REVERSE=reverse,
        SIZE=size,
        BLOCK=block,
        num_warps=4,
    )
    return starts


def _walk(
    plan: Plan,
    x: Tensor,
    B: Tensor,
    starts: Tensor | None,
    keep: Tensor | None,
    ends: Tensor | None,
    decays: Tensor | None,
    reverse: bool,
) -> None:
    """Take the states through the chunks of each split; write what is wanted of those before chunks and at the end."""
    parts, split = plan.splits()
    launch(
        kernels.states,
        (plan.lanes, parts, plan.block_n // plan.part_n),
        x,
        B,
        *plan.of_tokens,
        starts,
        keep,
        ends,
        decays,
        plan.length,
        plan.chunks,
        split,
        plan.heads,
        plan.group_heads,
        *x.stride()[:3],
        *B.stride()[:3],
        REVERSE=reverse,
        PART_N=plan.part_n,
        **plan.tile_options(plan.sizes.states),
    )
