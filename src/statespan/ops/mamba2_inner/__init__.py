"""What a Mamba-2 mixer does between its two projections, as one differentiable op."""

import math
from typing import Any

from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_dim, check_shape, needs_gradients
from statespan.ops.custom_op import define
from statespan.ops.mamba2_inner import inner
from statespan.ops.ssd import _fake_forward as fake_ssd

__all__ = ["mamba2_inner"]


def mamba2_inner(
    zxBCdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm: Tensor | None = None,
    *,
    num_groups: int = 1,
    norm_epsilon: float = 1e-5,
    norm_size: int | None = None,
    norm_before_gate: bool = False,
    initial_conv: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 256,
    discretization: str = "mamba",
) -> tuple[Tensor, Tensor, Tensor]:
    """[z|xBC|dt] = zxBCdt; [x|B|C] = silu(conv(xBC)); y = ssd(x, dt, -exp(A_log), B, C, D); norm(y * silu(z)).

    The Mamba-2 mixer (arXiv 2405.21060, figure 6) without in_proj and out_proj. The values are those of the ops that it
    is made of; the conv's output is computed again in the backward, and the gradients of z, xBC and dt are put together
    once.

    Args:
        zxBCdt: [b t d+c+h], float; c = d + 2 g n.
        conv_weight, conv_bias: [c k] and [c].
        dt_bias, A_log: [h], float32; D: [h] or [h p], float32.
        norm: [d], weight of the gated RMS norm; None: the gate alone. norm_epsilon, norm_size (channels that are
            normalised together, None: all) and norm_before_gate as in `gated_rms_norm`.
        num_groups: g.
        initial_conv, initial_state: [b k-1 c] and [b h p n], as in `causal_conv1d` and `ssd`.
        segments, dt_limit, chunk_size, discretization: as in `ssd`.

    Returns:
        The gated output [b t d] in zxBCdt.dtype, the conv's final state [b k-1 c], and ssd's [b h p n] float32.

    Raises:
        UserError: shapes disagree.

    Numerics: those of the ops.
    """
    op = "mamba2_inner"
    check_dim(op, "zxBCdt", zxBCdt, "[b t d+c+h]")
    check_dim(op, "conv_weight", conv_weight, "[c k]")
    check_dim(op, "A_log", A_log, "[h]")
    channels, heads = conv_weight.shape[0], A_log.shape[0]
    size = zxBCdt.shape[-1] - channels - heads
    if size < 1 or size % heads or channels < size or (channels - size) % (2 * num_groups):
        raise UserError(
            f"{op}: zxBCdt has {zxBCdt.shape[-1]} channels, the conv {channels}, and there are {heads} heads and"
            f" {num_groups} groups: d = {size} must be a multiple of the heads, and c - d one of twice the groups"
        )
    check_shape(op, "dt_bias", dt_bias, "[h]", (heads,))
    check_shape(op, "norm", norm, "[d]", (size,))
    norm_size = size if norm_size is None else norm_size
    if norm_size < 1 or size % norm_size:
        raise UserError(f"{op}: norm_size {norm_size} must divide d = {size}")
    tensors = (zxBCdt, conv_weight, conv_bias, dt_bias, A_log, D, norm, initial_conv, initial_state)
    options = (num_groups, norm_epsilon, norm_size, norm_before_gate, *dt_limit, chunk_size, discretization)
    return _mamba2_inner(*tensors, segments, *options, needs_gradients(*tensors))[:3]


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, keep = arguments
    given = inner.Inner(*inputs)
    z, xBC, dt = given.split()
    y, final_state = fake_ssd(*given.ssd(xBC, dt))
    y = y.flatten(-2)
    taps = given.conv_weight.shape[1]
    final_conv = z.new_empty(z.shape[0], taps - 1, xBC.shape[-1])
    return z.new_empty(z.shape), final_conv, final_state, z.new_empty(z.shape if keep else (0,))


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in arguments[4:13] if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[10:-1]
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], *inputs[:10])


def _autograd(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    y, *tensors = ctx.saved_tensors
    found = iter(_mamba2_inner_backward(*output_gradients[:3], y, *tensors, *ctx.options))
    grads = (None if value is None else next(found) for value in tensors[:-1])
    return *grads, *[None] * (2 + len(ctx.options))


_ARGUMENTS = (
    "Tensor zxBCdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? norm,"
    " Tensor? initial_conv, Tensor? initial_state, Tensor? segments, int num_groups, float norm_epsilon, int norm_size,"
    " bool norm_before_gate, float dt_min, float dt_max, int chunk_size, str discretization"
)
_mamba2_inner = define(
    f"mamba2_inner({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    inner.forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_mamba2_inner_backward = define(
    f"mamba2_inner_backward(Tensor? grad_gated, Tensor? grad_conv, Tensor? grad_state, Tensor y, {_ARGUMENTS})"
    " -> Tensor[]",
    inner.backward,
    _fake_backward,
)
