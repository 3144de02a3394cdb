"""One token through half a block, h + f(RMSNorm(h)), prepared once and then called at the least cost.

Decoding at batch 1 is bound by reading weights and by what happens around that; the parts of a mixer as ops of their
own cost a call and a wait each. `prepare` looks up once what never changes between tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from statespan.ops.decode_step.weights import (
    FeedForwardWeights,
    HeadWeights,
    Mamba1Weights,
    Mamba2Weights,
    Projection,
    Router,
)
from statespan.ops.dispatch import resolve

__all__ = [
    "FeedForwardWeights",
    "HeadWeights",
    "Mamba1Weights",
    "Mamba2Weights",
    "Projection",
    "Router",
    "prepare",
    "prepare_stack",
    "prepare_verify",
]

OPS = {
    Mamba1Weights: "mamba1_step",
    Mamba2Weights: "mamba2_step",
    FeedForwardWeights: "feed_forward_step",
    HeadWeights: "head_step",
}


def prepare(
    weights: Mamba1Weights | Mamba2Weights | FeedForwardWeights | HeadWeights,
    num_rows: int,
    hidden_dtype: torch.dtype,
    conv_dtype: torch.dtype,
) -> Callable[..., Any] | None:
    """A prepared step for batches of `num_rows`, or None where no backend beats the layer's own forward.

    Args:
        weights: of a mixer or a feed-forward layer, and of the norm before it.
        num_rows: b.
        hidden_dtype: of the residual stream.
        conv_dtype: of a mixer's conv_state.

    Returns:
        For a mixer `step(hidden [b h], conv_state [b k-1 c], ssm_state) -> (hidden, conv_state, ssm_state)`, for a
        feed-forward layer `step(hidden) -> hidden`, for the head `step(hidden) -> logits [b v]`. On the CPU inputs are
        left as they are; on a GPU hidden and the states are overwritten and returned, so that a CUDA graph can hold the
        step. Not differentiable, and not for two threads at once: a step owns its scratch memory. It reads the weights
        where they were when it was prepared.

    Numerics: what passes between the parts of up to 8 rows is float32, whatever the weights are; large products of 2 to
        8 rows with 16-bit weights see it as two numbers of 16 bits, which hold 16 of its 24 digits (float16: 22).
    """
    if not all(value.plain for value in vars(weights).values() if isinstance(value, Projection)):
        return None
    device = weights.norm.device
    backend = _module(resolve(OPS[type(weights)], "auto", device, hidden_dtype, conv_dtype))
    if backend is None:
        return None
    match weights:
        case Mamba1Weights():
            return backend.mamba1(weights, num_rows, hidden_dtype, conv_dtype)
        case Mamba2Weights():
            return backend.mamba2(weights, num_rows, hidden_dtype, conv_dtype)
        case FeedForwardWeights():
            return backend.feed_forward(weights, num_rows, hidden_dtype)
        case HeadWeights():
            return backend.head(weights, num_rows, hidden_dtype)


def prepare_stack(
    weights: Sequence[Mamba1Weights], states: Sequence[tuple[Tensor, Tensor]], hidden_dtype: torch.dtype
) -> Callable[[Tensor], Tensor] | None:
    """A token through blocks that stand one after the other, as one call; None where `prepare` must do.

    Args:
        weights: of the blocks.
        states: conv_state [b k-1 c] and ssm_state [b c n] of each, which the call overwrites.
        hidden_dtype: of the residual stream.

    Returns:
        `step(hidden [b h]) -> hidden`, which is overwritten; for NVIDIA GPUs, as `prepare`.
    """
    if resolve("mamba1_step", "auto", weights[0].norm.device, hidden_dtype) != "cuda":
        return None
    from statespan.ops.decode_step.stack import mamba1_stack

    return mamba1_stack(weights, states, hidden_dtype)


def prepare_verify(
    weights: Mamba1Weights | Mamba2Weights,
    num_rows: int,
    num_tokens: int,
    hidden_dtype: torch.dtype,
    conv_dtype: torch.dtype,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Several tokens of each row through a mixer's half of a block, with the state after each of them kept.

    Args:
        weights, hidden_dtype, conv_dtype: as for `prepare`.
        num_rows, num_tokens: b and t.

    Returns:
        `step(hidden [b*t h], conv_state [b k-1 c], ssm_state, conv_states [t b k-1 c], ssm_states [t b ..]) -> hidden`,
        which is overwritten, as the last two are; the states that it starts from stay. For NVIDIA GPUs and float32
        states, as `prepare`; None elsewhere.
    """
    plain = all(value.plain for value in vars(weights).values() if isinstance(value, Projection))
    if not plain or resolve(OPS[type(weights)], "auto", weights.norm.device, hidden_dtype, conv_dtype) != "cuda":
        return None
    from statespan.ops.decode_step import verify

    if num_tokens > verify.MOST_TOKENS:
        return None
    make = verify.mamba1 if isinstance(weights, Mamba1Weights) else verify.mamba2
    return make(weights, num_rows, num_tokens, hidden_dtype, conv_dtype)  # type: ignore[arg-type]  # each its own weights


def _module(name: str) -> Any:
    """The compiled backend of that name, or None; loaded when it runs."""
    match name:
        case "cuda":
            from statespan.ops.decode_step import cuda

            return cuda
        case "cpu":
            from statespan.ops.decode_step import cpu

            return cpu
        case _:
            return None
