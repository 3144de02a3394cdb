"""The Mamba-2 half of a block, norm, mixer and residual sum, as one differentiable op."""

import math

from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import (
    DISCRETIZATIONS,
    check_dim,
    check_groups,
    check_name,
    check_steps,
    check_tensors,
    needs_gradients,
)
from statespan.ops.autocast import product_dtype
from statespan.ops.mamba2_block import inner
from statespan.ops.mixer_block import define_block

__all__ = ["mamba2_block"]


def mamba2_block(
    hidden: Tensor,
    update: Tensor | None,
    norm: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    gate_norm: Tensor | None,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    epsilon: float,
    num_groups: int = 1,
    norm_size: int | None = None,
    norm_before_gate: bool = False,
    initial_conv: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 256,
    discretization: str = "mamba",
    keep_projected: bool = True,
    keep_convolved: bool = False,
    keep_cast: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = hidden + update; [z|xBC|dt] = in_proj norm(h); [x|B|C] = silu(conv xBC); out_proj(norm(ssd(x, ..) silu(z))).

    The Mamba-2 mixer (arXiv 2405.21060, figure 6) with the norm before it. The values are those of the ops that it is
    made of; for the backward it keeps h, in_proj's output and ssd's, and computes the norms' and the conv's outputs
    again. Gradients of weights are sums in their dtype.

    Args:
        hidden: [b t h], float32 as a rule. update: [b t h], float, or None.
        norm: [h], weight of the RMS norm. in_proj: [d+c+a h] and its bias [d+c+a]; a heads, c = d + 2 g n.
        conv_weight, conv_bias: [c k] and [c].
        dt_bias, A_log: [a], float32; D: [a] or [a p], float32.
        gate_norm: [d], weight of the gated RMS norm; None: the gate alone. norm_size (channels that are normalised
            together, None: all) and norm_before_gate as in `gated_rms_norm`.
        out_proj: [h d] and its bias [h].
        epsilon: of both norms.
        num_groups: g.
        initial_conv, initial_state: [b k-1 c] and [b a p n], as in `causal_conv1d` and `ssd`.
        segments, dt_limit, chunk_size, discretization: as in `ssd`.
        keep_projected: whether in_proj's output is kept for the backward, or computed again.
        keep_convolved: the same for the conv's output, where the former is kept.
        keep_cast: the same for the products' weights in the dtype of autocast.

    Returns:
        h [b t h] in hidden.dtype, out_proj's output [b t h], the conv's final state [b k-1 c], and ssd's [b a p n]
        float32.

    Raises:
        UserError: shapes or devices disagree (both in the message), or there is no time step.
        UnknownName: an unknown discretization.

    Numerics: those of the ops; products in the weights' dtype, under autocast in its dtype.
    """
    op = "mamba2_block"
    check_dim(op, "hidden", hidden, "[b t h]")
    check_dim(op, "in_proj", in_proj, "[d+c+a h]")
    check_dim(op, "conv_weight", conv_weight, "[c k]")
    check_dim(op, "A_log", A_log, "[a]")
    (batch, length, width), channels, heads = hidden.shape, conv_weight.shape[0], A_log.shape[0]
    check_steps(op, "hidden", hidden, "[b t h]")
    if chunk_size < 1 or not dt_limit[0] <= dt_limit[1]:
        raise UserError(f"{op}: chunk_size must be at least 1 and dt_limit rise, got {chunk_size} and {dt_limit}")
    check_name("discretization", discretization, DISCRETIZATIONS)
    check_groups(op, num_groups, "a", heads)
    size = in_proj.shape[0] - channels - heads
    if size < 1 or size % heads or channels < size or (channels - size) % (2 * num_groups):
        raise UserError(
            f"{op}: in_proj gives {in_proj.shape[0]} channels, the conv takes {channels}, and there are {heads} heads"
            f" and {num_groups} groups: d = {size} must be a multiple of the heads, and c - d one of twice the groups"
        )
    head_dim, states, taps = size // heads, (channels - size) // (2 * num_groups), conv_weight.shape[1]
    check_tensors(
        op,
        {
            "hidden": (hidden, "[b t h]", (batch, length, width)),
            "update": (update, "[b t h]", (batch, length, width)),
            "norm": (norm, "[h]", (width,)),
            "in_proj": (in_proj, "[d+c+a h]", (in_proj.shape[0], width)),
            "in_bias": (in_bias, "[d+c+a]", (in_proj.shape[0],)),
            "conv_weight": (conv_weight, "[c k]", (channels, taps)),
            "conv_bias": (conv_bias, "[c]", (channels,)),
            "dt_bias": (dt_bias, "[a]", (heads,)),
            "A_log": (A_log, "[a]", (heads,)),
            "D": (D, "[a] or [a p]", (heads, head_dim)[: max(D.dim(), 1)]),
            "gate_norm": (gate_norm, "[d]", (size,)),
            "out_proj": (out_proj, "[h d]", (width, size)),
            "out_bias": (out_bias, "[h]", (width,)),
            "initial_conv": (initial_conv, "[b k-1 c]", (batch, taps - 1, channels)),
            "initial_state": (initial_state, "[b a p n]", (batch, heads, head_dim, states)),
            "segments": (segments, "[b t]", (batch, length)),
        },
    )
    norm_size = size if norm_size is None else norm_size
    if norm_size < 1 or size % norm_size:
        raise UserError(f"{op}: norm_size {norm_size} must divide d = {size}")
    dtype = product_dtype(in_proj)
    initial_conv = None if initial_conv is None else initial_conv.to(dtype)
    ends = (norm, in_proj, in_bias, out_proj, out_bias)
    middle = (conv_weight, conv_bias, dt_bias, A_log, D, gate_norm, initial_conv, initial_state)
    options = (num_groups, epsilon, norm_size, norm_before_gate, *map(float, dt_limit), chunk_size, discretization)
    tensors = (hidden, update, *ends, *middle)
    keep = (1 + keep_projected * (1 + keep_convolved)) * needs_gradients(*tensors)
    total, out, conv, state, *_ = _mamba2_block(*tensors, segments, *options, epsilon, dtype, keep, keep_cast)
    return hidden if update is None else total, out, conv, state


_mamba2_block = define_block("mamba2_block", inner.MIDDLE)
