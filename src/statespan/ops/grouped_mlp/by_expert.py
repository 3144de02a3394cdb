"""Experts' MLPs as matrix products over tokens sorted by expert; experts that nobody chose are never touched."""

from typing import cast

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.activation import activate
from statespan.ops.custom_op import gradients
from statespan.ops.grouped_mlp.experts import Experts


class Groups:
    """The choices [t k], flattened, sorted by expert; dropped ones (-1) come first.

    Attributes:
        order: [t k], int64. The choice at each sorted place.
        token: [t k], int64. Its token.
        spans: (expert, start, stop) of each expert with tokens, in sorted places.
        dropped: how many choices go to no expert.
    """

    def __init__(self, expert_index: Tensor, num_experts: int) -> None:
        experts, self.order = expert_index.flatten().sort(stable=True)
        self.token = self.order // expert_index.shape[1]
        bounds = torch.searchsorted(experts, torch.arange(-1, num_experts + 1, device=experts.device)).tolist()
        if bounds[0] > 0 or bounds[-1] < len(experts):
            _check(experts[[0, -1]].tolist(), num_experts)
        self.dropped = bounds[1]
        limits = zip(range(num_experts), bounds[1:], bounds[2:], strict=False)
        self.spans = [(expert, start, stop) for expert, start, stop in limits if stop > start]

    def unsorted(self, rows: Tensor) -> Tensor:
        """Rows at sorted places -> rows at [t k], dropped choices 0. Each place is written once: deterministic."""
        rows[: self.dropped] = 0
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def forward(
    x: Tensor, expert_index: Tensor, expert_weight: Tensor, experts: Experts, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """[t h] of `statespan.ops.grouped_mlp`, and what the backward needs: the inner rows before the activation."""
    if x.shape[0] == 1 and not keep:
        return _one_token(x, expert_index, expert_weight, experts, activation), x.new_empty(0, experts.up_proj.shape[1])
    groups = Groups(expert_index, experts.up_proj.shape[0])
    choices = expert_index.numel()
    kept = x.new_zeros(choices if keep else 0, experts.up_proj.shape[1])
    rows, results = x[groups.token], x.new_empty(choices, x.shape[1])
    for expert, start, stop in groups.spans:
        inner = experts.up(rows[start:stop], expert)
        if keep:
            kept[start:stop] = inner
        results[start:stop] = experts.down(activate(inner, activation), expert)
    dtype = torch.promote_types(x.dtype, torch.float32)
    results = groups.unsorted(results).unflatten(0, expert_index.shape).to(dtype)
    return (results * expert_weight.to(dtype)[..., None]).sum(1).to(x.dtype), kept


def _one_token(x: Tensor, expert_index: Tensor, expert_weight: Tensor, experts: Experts, activation: str) -> Tensor:
    """The same for decoding, without the sorting: a few small operations less, which a token's time shows."""
    chosen, weights = expert_index[0].tolist(), expert_weight[0].tolist()
    _check(chosen, experts.up_proj.shape[0])
    y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for expert, weight in zip(chosen, weights, strict=True):
        if expert != -1:
            y.add_(experts.down(activate(experts.up(x, expert), activation), expert), alpha=weight)
    return y.to(x.dtype)


def _check(chosen: list[int], num_experts: int) -> None:
    """Raise UserError for an index that names no expert."""
    for expert in chosen:
        if not -1 <= expert < num_experts:
            raise UserError(
                f"grouped_mlp: expert {expert} is out of range; there are 0 to {num_experts - 1}, and -1 for none"
            )


def backward(
    grad_y: Tensor,
    kept: Tensor,
    x: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    experts: Experts,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, expert_weight and the experts' parameters; None where there is no bias."""
    groups = Groups(expert_index, experts.up_proj.shape[0])
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, grad_rows = x[groups.token], grad_y[groups.token]
    weight = expert_weight.to(dtype).flatten()[groups.order][:, None]
    grad_rows_in, grad_weight = torch.empty_like(rows), torch.empty_like(weight)
    grad_up, grad_down = (proj.new_zeros(proj.shape) for proj in (experts.up_proj, experts.down_proj))
    grad_up_bias, grad_down_bias = weight.new_zeros(grad_up.shape[:2]), weight.new_zeros(grad_down.shape[:2])
    for expert, start, stop in groups.spans:
        here = slice(start, stop)
        grad_out, inner = grad_rows[here], kept[here]
        grad_hidden = grad_out @ experts.down_proj[expert]
        # Only now comes the choice's weight: its own gradient is the unweighted output's with grad_y.
        weighted, hidden = (grad_out * weight[here]).to(x.dtype), activate(inner, activation)
        grad_weight[here] = (grad_hidden.to(dtype) * hidden).sum(1, keepdim=True)
        if experts.down_bias is not None:
            grad_weight[here] += grad_out.to(dtype) @ experts.down_bias[expert, :, None].to(dtype)
        grad_inner = _before_activation((grad_hidden * weight[here]).to(x.dtype), inner, activation)
        grad_rows_in[here] = grad_inner @ experts.up_proj[expert]
        grad_up[expert], grad_down[expert] = grad_inner.T @ rows[here], weighted.T @ hidden
        grad_up_bias[expert], grad_down_bias[expert] = grad_inner.sum(0, dtype=dtype), weighted.sum(0, dtype=dtype)
    return (
        groups.unsorted(grad_rows_in).unflatten(0, expert_index.shape).sum(1, dtype=dtype).to(x.dtype),
        groups.unsorted(grad_weight).view(expert_index.shape).to(expert_weight.dtype),
        grad_up,
        grad_down,
        None if experts.up_bias is None else grad_up_bias.to(experts.up_bias.dtype),
        None if experts.down_bias is None else grad_down_bias.to(experts.down_bias.dtype),
    )


def _before_activation(grad_hidden: Tensor, inner: Tensor, activation: str) -> Tensor:
    """The gradient of the activation's input from that of its output."""
    return cast(Tensor, gradients(lambda inner: (activate(inner, activation),), (inner,), (grad_hidden,))[0])
