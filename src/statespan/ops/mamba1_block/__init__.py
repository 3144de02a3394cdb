"""The Mamba-1 half of a block, norm, mixer and residual sum, as one differentiable op."""

from torch import Tensor

from statespan.ops.arguments import DISCRETIZATIONS, check_dim, check_name, check_steps, check_tensors, needs_gradients
from statespan.ops.autocast import product_dtype
from statespan.ops.mamba1_block import inner
from statespan.ops.mixer_block import define_block

__all__ = ["mamba1_block"]


def mamba1_block(
    hidden: Tensor,
    update: Tensor | None,
    norm: Tensor,
    in_proj: Tensor,
    in_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    out_proj: Tensor,
    out_bias: Tensor | None,
    *,
    epsilon: float,
    inner_norms: tuple[Tensor, Tensor, Tensor] | None = None,
    initial_conv: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    discretization: str = "mamba",
    keep_projected: bool = True,
    keep_convolved: bool = False,
    keep_cast: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = hidden + update; [x|z] = in_proj norm(h); u = silu(conv x); out_proj(scan(u, ..) silu(z)).

    [dt|B|C] = x_proj u, and dt goes through dt_proj: the Mamba-1 mixer (arXiv 2312.00752, figure 3) behind a norm. The
    values are those of the ops that it is made of; for the backward it keeps h, [x|z] and what the scan needs, and
    computes the norm's output, u, dt and the scan's output again. Gradients of weights are sums in their dtype.

    Args:
        hidden: [b t h], float32 as a rule. update: [b t h], float, or None.
        norm: [h], weight of the RMS norm. in_proj: [2d h] and its bias [2d].
        conv_weight, conv_bias: [d k] and [d].
        x_proj: [r+2n d]; dt_proj: [d r].
        dt_bias, D: [d], A_log: [d n], float32.
        out_proj: [h d] and its bias [h].
        epsilon: of all norms.
        inner_norms: weights [r], [n] and [n] of RMS norms of dt, B and C (Jamba).
        initial_conv, initial_state: [b k-1 d] and [b d n], as in `causal_conv1d` and `selective_scan`.
        segments: [b t], as there.
        discretization: as in `selective_scan`.
        keep_projected: whether [x|z] is kept for the backward, or computed again.
        keep_convolved: the same for the conv's output, where the former is kept.
        keep_cast: the same for the products' weights in the dtype of autocast.

    Returns:
        h [b t h] in hidden.dtype, out_proj's output [b t h], the conv's final state [b k-1 d], and the scan's [b d n]
        float32.

    Raises:
        UserError: shapes or devices disagree (both in the message), or there is no time step.
        UnknownName: an unknown discretization.

    Numerics: those of the ops; products in the weights' dtype, under autocast in its dtype.
    """
    op = "mamba1_block"
    check_dim(op, "hidden", hidden, "[b t h]")
    check_dim(op, "A_log", A_log, "[d n]")
    check_dim(op, "dt_proj", dt_proj, "[d r]")
    check_dim(op, "conv_weight", conv_weight, "[d k]")
    (batch, length, size), (channels, states) = hidden.shape, A_log.shape
    rank, taps = dt_proj.shape[1], conv_weight.shape[1]
    check_steps(op, "hidden", hidden, "[b t h]")
    check_name("discretization", discretization, DISCRETIZATIONS)
    dt_norm, B_norm, C_norm = inner_norms or (None, None, None)
    check_tensors(
        op,
        {
            "hidden": (hidden, "[b t h]", (batch, length, size)),
            "update": (update, "[b t h]", (batch, length, size)),
            "norm": (norm, "[h]", (size,)),
            "in_proj": (in_proj, "[2d h]", (2 * channels, size)),
            "in_bias": (in_bias, "[2d]", (2 * channels,)),
            "conv_weight": (conv_weight, "[d k]", (channels, taps)),
            "conv_bias": (conv_bias, "[d]", (channels,)),
            "x_proj": (x_proj, "[r+2n d]", (rank + 2 * states, channels)),
            "dt_proj": (dt_proj, "[d r]", (channels, rank)),
            "dt_bias": (dt_bias, "[d]", (channels,)),
            "A_log": (A_log, "[d n]", (channels, states)),
            "D": (D, "[d]", (channels,)),
            "out_proj": (out_proj, "[h d]", (size, channels)),
            "out_bias": (out_bias, "[h]", (size,)),
            "inner_norms[0]": (dt_norm, "[r]", (rank,)),
            "inner_norms[1]": (B_norm, "[n]", (states,)),
            "inner_norms[2]": (C_norm, "[n]", (states,)),
            "initial_conv": (initial_conv, "[b k-1 d]", (batch, taps - 1, channels)),
            "initial_state": (initial_state, "[b d n]", (batch, channels, states)),
            "segments": (segments, "[b t]", (batch, length)),
        },
    )
    dtype = product_dtype(in_proj)
    initial_conv = None if initial_conv is None else initial_conv.to(dtype)
    ends = (norm, in_proj, in_bias, out_proj, out_bias)
    middle = (conv_weight, conv_bias, x_proj, dt_norm, B_norm, C_norm, dt_proj, dt_bias, A_log, D)
    tensors = (hidden, update, *ends, *middle, initial_conv, initial_state)
    keep = (1 + keep_projected * (1 + keep_convolved)) * needs_gradients(*tensors)
    options = (epsilon, discretization, epsilon, dtype, keep, keep_cast)
    total, out, conv, state, *_ = _mamba1_block(*tensors, segments, *options)
    return hidden if update is None else total, out, conv, state


_mamba1_block = define_block("mamba1_block", inner.MIDDLE)
