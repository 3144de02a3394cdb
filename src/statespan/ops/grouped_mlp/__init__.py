"""Mixture-of-experts feed-forward: each token through the MLPs of the experts that its router chose."""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.activation import ACTIVATIONS, GATED
from statespan.ops.arguments import check_devices, check_dim, check_name, check_shape, needs_gradients
from statespan.ops.autocast import autocast
from statespan.ops.custom_op import define, gradients
from statespan.ops.dispatch import resolve
from statespan.ops.grouped_mlp import by_expert, reference
from statespan.ops.grouped_mlp.experts import Experts

__all__ = ["grouped_mlp"]


def grouped_mlp(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """Mixture of MLPs: y_t = sum_k w_tk down_e(act(up_e(x_t))) with e = index_tk   (arXiv 1701.06538, eq. 1).

    Args:
        x: [t h], float.
        expert_index: [t k], int64 in [0, e). The experts of each token; -1 is a choice that was dropped.
        expert_weight: [t k], float.
        up_proj: [e f h], in x.dtype or int8; gated [e 2f h], the gate's rows first.
        down_proj: [e h f], in x.dtype or int8.
        up_bias, down_bias: [e f] (gated: [e 2f]) and [e h], in x.dtype.
        up_scale, down_scale: [e f] (gated: [e 2f]) and [e h], float32, for int8 weights only: W = Q * scale; see
            `quantize_rows`. int8 weights have no gradients, and neither has x through them.
        activation: gated "swiglu" (silu(gate) * up), "geglu" (gelu(gate) * up); plain "silu", "gelu" (exact), "relu".
        backend: "auto", or a name from `statespan backends`; a named backend runs or raises.

    Returns:
        [t h] in x.dtype (under autocast everything but expert_weight is cast to its dtype first). Differentiable with
        respect to every float input; the backward keeps the inner rows [t k f] before the activation.

    Raises:
        UserError: shapes, dtypes or devices disagree, or an index names no expert (with "triton" the token's output
            is NaN instead: to raise, the host would have to wait for the device).
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: products in x.dtype, the weighted sum over the choices in float32. Deterministic.

    Example:
        >>> x, up, down = torch.randn(3, 8), torch.randn(4, 32, 8), torch.randn(4, 8, 16)
        >>> index, weight = torch.tensor([[0, 1], [3, 2], [1, -1]]), torch.full((3, 2), 0.5)
        >>> grouped_mlp(x, index, weight, up, down).shape
        torch.Size([3, 8])
    """
    op = "grouped_mlp"
    check_dim(op, "x", x, "[t h]")
    check_dim(op, "expert_index", expert_index, "[t k]")
    check_dim(op, "down_proj", down_proj, "[e h f]")
    check_name(f"activation of {op}", activation, ACTIVATIONS)
    tokens, hidden_size = x.shape
    experts, _, inner_size = down_proj.shape
    up_size = 2 * inner_size if activation in GATED else inner_size
    check_shape(op, "expert_index", expert_index, "[t k]", (tokens, expert_index.shape[1]))
    check_shape(op, "expert_weight", expert_weight, "[t k]", tuple(expert_index.shape))
    check_shape(op, "down_proj", down_proj, "[e h f]", (experts, hidden_size, inner_size))
    check_shape(
        op, "up_proj", up_proj, "[e 2f h]" if activation in GATED else "[e f h]", (experts, up_size, hidden_size)
    )
    check_shape(op, "up_bias", up_bias, "[e 2f]" if activation in GATED else "[e f]", (experts, up_size))
    check_shape(op, "down_bias", down_bias, "[e h]", (experts, hidden_size))
    check_shape(op, "up_scale", up_scale, "[e 2f]" if activation in GATED else "[e f]", (experts, up_size))
    check_shape(op, "down_scale", down_scale, "[e h]", (experts, hidden_size))
    check_devices(
        op,
        x=x,
        expert_index=expert_index,
        expert_weight=expert_weight,
        up_proj=up_proj,
        down_proj=down_proj,
        up_bias=up_bias,
        down_bias=down_bias,
        up_scale=up_scale,
        down_scale=down_scale,
    )
    int8 = [up_proj.dtype == torch.int8, down_proj.dtype == torch.int8, up_scale is not None, down_scale is not None]
    if any(int8) and not all(int8):
        raise UserError(f"{op}: int8 weights need up_scale and down_scale, both, and others take none")
    if up_scale is not None and down_scale is not None:
        tensors = (autocast(x), expert_index, expert_weight, up_proj, down_proj, up_bias, down_bias)
        return _grouped_mlp_int8(*tensors, up_scale, down_scale, activation, backend)
    x, up_proj, down_proj = autocast(x), autocast(up_proj), autocast(down_proj)
    up_bias, down_bias = autocast(up_bias), autocast(down_bias)
    for name, tensor in (
        ("up_proj", up_proj),
        ("down_proj", down_proj),
        ("up_bias", up_bias),
        ("down_bias", down_bias),
    ):
        if tensor is not None and tensor.dtype != x.dtype:
            raise UserError(f"{op}: x is {x.dtype} and {name} {tensor.dtype}; they must agree")
    keep = backend != "reference" and needs_gradients(x, expert_weight, up_proj, down_proj, up_bias, down_bias)
    tensors = (x, expert_index, expert_weight, up_proj, down_proj, up_bias, down_bias)
    return _grouped_mlp(*tensors, activation, keep, backend)[0]


def _forward(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    experts = Experts(up_proj, down_proj, up_bias, down_bias)
    return _run(x, expert_index, expert_weight, experts, activation, keep, backend)


def _forward_int8(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_scale: Tensor,
    down_scale: Tensor,
    activation: str,
    backend: str,
) -> Tensor:
    experts = Experts(up_proj, down_proj, up_bias, down_bias, up_scale, down_scale)
    return _run(x, expert_index, expert_weight, experts, activation, False, backend)[0]


def _run(
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    experts: Experts,
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y, and with `keep` what the backward needs."""
    with torch.autocast(x.device.type, enabled=False):
        match resolve("grouped_mlp", backend, x.device, x.dtype):
            case "triton":
                from statespan.ops.grouped_mlp import triton_backend  # imports Triton, so imported when it runs

                return triton_backend.forward(x, expert_index, expert_weight, experts, activation, keep)
            case "torch":
                return by_expert.forward(x, expert_index, expert_weight, experts, activation, keep)
            case _:
                y = reference.grouped_mlp(x, expert_index, expert_weight, experts, activation)
                return y, x.new_empty(0, experts.up_proj.shape[1])


def _backward(
    grad_y: Tensor,
    kept: Tensor,
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    backend: str,
) -> list[Tensor]:
    experts = Experts(up_proj, down_proj, up_bias, down_bias)
    with torch.autocast(x.device.type, enabled=False):
        match resolve("grouped_mlp", backend, x.device, x.dtype):
            case "triton":
                from statespan.ops.grouped_mlp import triton_backward  # imports Triton, so imported when it runs

                found = triton_backward.backward(grad_y, kept, x, expert_index, expert_weight, experts, activation)
            case "torch":
                found = by_expert.backward(grad_y, kept, x, expert_index, expert_weight, experts, activation)
            case _:
                found = gradients(
                    lambda x, weight, *experts: (
                        reference.grouped_mlp(x, expert_index, weight, Experts(*experts), activation),
                    ),
                    (x, expert_weight, up_proj, down_proj, up_bias, down_bias),
                    (grad_y,),
                )
    return [gradient for gradient in found if gradient is not None]


def _fake_forward(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, up_proj: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    keep = rest[-2]
    return x.new_empty(x.shape), x.new_empty(expert_index.numel() if keep else 0, up_proj.shape[1])


def _fake_backward(grad_y: Tensor, kept: Tensor, x: Tensor, expert_index: Tensor, *rest: Any) -> list[Tensor]:
    inputs = (x, *rest[:5])
    return [value.new_empty(value.shape) for value in inputs if value is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the second output has none
    ctx.save_for_backward(output[1], *tensors)


def _autograd(ctx: Any, grad_y: Tensor, _: None) -> tuple[Tensor | None, ...]:
    kept, *tensors = ctx.saved_tensors
    found = iter(_grouped_mlp_backward(grad_y, kept, *tensors, ctx.activation, ctx.backend))
    return (next(found), None, *(None if value is None else next(found) for value in tensors[2:]), None, None, None)


_TENSORS = (
    "Tensor x, Tensor expert_index, Tensor expert_weight, Tensor up_proj, Tensor down_proj, Tensor? up_bias,"
    " Tensor? down_bias"
)
_grouped_mlp = define(
    f"grouped_mlp({_TENSORS}, str activation, bool keep, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_autograd,
)
_grouped_mlp_backward = define(
    f"grouped_mlp_backward(Tensor grad_y, Tensor kept, {_TENSORS}, str activation, str backend) -> Tensor[]",
    _backward,
    _fake_backward,
)
_grouped_mlp_int8 = define(
    f"grouped_mlp_int8({_TENSORS}, Tensor up_scale, Tensor down_scale, str activation, str backend) -> Tensor",
    _forward_int8,
    lambda x, *_: x.new_empty(x.shape),
)
