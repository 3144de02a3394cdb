"""What a Mamba-1 mixer does between its two outer projections, as one differentiable op."""

from typing import Any

from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_dim, check_shape, needs_gradients
from statespan.ops.autocast import autocast
from statespan.ops.custom_op import define
from statespan.ops.mamba1_inner import inner
from statespan.ops.selective_scan import _fake_forward as fake_scan

__all__ = ["mamba1_inner"]


def mamba1_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    inner_norms: tuple[Tensor, Tensor, Tensor] | None = None,
    norm_epsilon: float = 1e-5,
    initial_conv: Tensor | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    discretization: str = "mamba",
) -> tuple[Tensor, Tensor, Tensor]:
    """[x|z] = xz; u = silu(conv(x)); [dt|B|C] = x_proj u; y = scan(u, dt_proj dt, -exp(A_log), B, C, D) * silu(z).

    The Mamba-1 mixer (arXiv 2312.00752, figure 3) without in_proj and out_proj. The values are those of the ops that it
    is made of; the gradients cost less memory and time: u and dt are computed again in the backward, and the gradients
    of x and z, and those that meet in u, are added where they lie.

    Args:
        xz: [b t 2d], float.
        conv_weight, conv_bias: [d k] and [d].
        x_proj: [r+2n d]; dt_proj: [d r]. Under autocast in its dtype.
        dt_bias, D: [d], A_log: [d n], float32.
        inner_norms: weights [r], [n] and [n] of RMS norms of dt, B and C (Jamba), with norm_epsilon.
        initial_conv, initial_state: [b k-1 d] and [b d n], as in `causal_conv1d` and `selective_scan`.
        segments: [b t], as there.
        discretization: as in `selective_scan`.

    Returns:
        y [b t d] in xz.dtype, the conv's final state [b k-1 d], and the scan's [b d n] float32.

    Raises:
        UserError: shapes disagree.

    Numerics: those of the ops; the products in x_proj.dtype, which must be that of xz.
    """
    op = "mamba1_inner"
    check_dim(op, "xz", xz, "[b t 2d]")
    check_dim(op, "A_log", A_log, "[d n]")
    check_dim(op, "dt_proj", dt_proj, "[d r]")
    (channels, states), rank = A_log.shape, dt_proj.shape[1]
    check_shape(op, "xz", xz, "[b t 2d]", (*xz.shape[:2], 2 * channels))
    check_shape(op, "x_proj", x_proj, "[r+2n d]", (rank + 2 * states, channels))
    check_shape(op, "dt_proj", dt_proj, "[d r]", (channels, rank))
    for norm, size in zip(inner_norms or (), (rank, states, states), strict=False):
        check_shape(op, "an inner norm", norm, "[r] or [n]", (size,))
    x_proj, dt_proj = autocast(x_proj), autocast(dt_proj)
    if not xz.dtype == x_proj.dtype == dt_proj.dtype:
        raise UserError(f"{op}: xz is {xz.dtype}, x_proj {x_proj.dtype} and dt_proj {dt_proj.dtype}; they must agree")
    norms = (None, None, None) if inner_norms is None else inner_norms
    tensors = (xz, conv_weight, conv_bias, x_proj, *norms, dt_proj, dt_bias, A_log, D, initial_conv, initial_state)
    keep = needs_gradients(*tensors)
    return _mamba1_inner(*tensors, segments, norm_epsilon, discretization, keep)[:3]


def _fake_forward(xz: Tensor, conv_weight: Tensor, _: Any, x_proj: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    A_log, keep = rest[5], rest[-1]
    (batch, length, _), (channels, states), taps = xz.shape, A_log.shape, conv_weight.shape[1]
    u, B = xz.new_empty(batch, length, channels), xz.new_empty(batch, length, 1, states)
    y, final_state, starts = fake_scan(u, u, A_log, B, B, None, u, None, None, None, True, "mamba", keep, "auto")
    selected = xz.new_empty((batch, length, x_proj.shape[0]) if keep else (0,))
    return y, xz.new_empty(batch, taps - 1, channels), final_state, selected, starts


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in arguments[5:18] if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.norm_epsilon, ctx.discretization, _ = inputs
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:], *tensors)


def _autograd(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *kept, segments = ctx.saved_tensors
    found = iter(_mamba1_inner_backward(*output_gradients[:3], *kept, segments, ctx.norm_epsilon, ctx.discretization))
    return *(None if value is None else next(found) for value in kept[2:]), None, None, None, None


_TENSORS = (
    "Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor? dt_norm, Tensor? B_norm, Tensor? C_norm,"
    " Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? initial_conv, Tensor? initial_state,"
    " Tensor? segments, float norm_epsilon, str discretization"
)
_mamba1_inner = define(
    f"mamba1_inner({_TENSORS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    inner.forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_mamba1_inner_backward = define(
    f"mamba1_inner_backward(Tensor? grad_y, Tensor? grad_conv, Tensor? grad_state, Tensor selected, Tensor starts,"
    f" {_TENSORS}) -> Tensor[]",
    inner.backward,
    _fake_backward,
)
