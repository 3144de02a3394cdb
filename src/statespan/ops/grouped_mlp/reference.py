"""Experts' MLPs one token after the other: the truth the other backends are held to."""

import torch
from torch import Tensor

from statespan.ops.activation import activate
from statespan.ops.grouped_mlp.experts import Experts


def grouped_mlp(x: Tensor, expert_index: Tensor, expert_weight: Tensor, experts: Experts, activation: str) -> Tensor:
    """[t h] of `statespan.ops.grouped_mlp`, differentiable by autograd; O(t k) Python steps."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs = [x[:0].to(dtype)]
    for token, chosen, weights in zip(x, expert_index.tolist(), expert_weight.to(dtype), strict=True):
        y = torch.zeros_like(token, dtype=dtype)
        for expert, weight in zip(chosen, weights, strict=True):
            if expert != -1:
                y = y + weight * experts.down(activate(experts.up(token, expert), activation), expert)
        outputs.append(y[None])
    return torch.cat(outputs).to(x.dtype)
