"""Mixture of experts: a router in float32 picks experts for each token, `ops.grouped_mlp` runs them.

The families differ in a few words of `MoEConfig`:
  MoE-Mamba    softmax, top_k=1, capacity_factor=1      y = p_i E_i(x)                   (arXiv 2401.04081, as Switch)
  Jamba        softmax, top_k=2                         y = sum_k p_k E_k(x)             (arXiv 2403.19887)
  Mixtral      softmax, top_k=2, renormalize            y = sum_k p_k E_k(x) / sum_k p_k (arXiv 2401.04088)
  BlackMamba   sigmoid, top_k=1, balancing="sinkhorn"   y = p_i E_i(x)                   (arXiv 2402.01771)

Padding tokens (negative segment) go to no expert, count in no statistic, and give zero.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from statespan.layers.config import MoEConfig
from statespan.layers.norm import RMSNorm
from statespan.layers.routing import RouterMetrics, drop_overflow, sinkhorn
from statespan.ops import grouped_mlp, quantize_rows
from statespan.ops.activation import GATED
from statespan.ops.decode_step import FeedForwardWeights, Projection, Router

SINKHORN_SHARPNESS = 2.0  # BlackMamba balances exp(2 logits)
SINKHORN_ITERATIONS = 8  # a fixed count compiles; marginals are within 1e-3 for logits of standard deviation 1


class Experts(nn.Module):
    """The experts' matrices, stacked: up_proj [e f h] (gated: [e 2f h], gate rows first) and down_proj [e h f]."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        count, inner = config.num_experts, config.intermediate_size
        up_rows = 2 * inner if config.activation in GATED else inner
        self.activation = config.activation
        self.up_proj = nn.Parameter(torch.empty(count, up_rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, inner))
        self.up_proj_bias = nn.Parameter(torch.empty(count, up_rows)) if config.bias else None
        self.down_proj_bias = nn.Parameter(torch.empty(count, hidden_size)) if config.bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each matrix and bias as nn.Linear initialises its own: uniform within 1 / sqrt(inputs)."""
        for weight, bias in ((self.up_proj, self.up_proj_bias), (self.down_proj, self.down_proj_bias)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(self, tokens: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """tokens [t h], expert_index [t k] (-1: none), expert_weight [t k] -> weighted sum of outputs [t h]."""
        return grouped_mlp(
            tokens,
            expert_index,
            expert_weight,
            self.up_proj,
            self.down_proj,
            self.up_proj_bias,
            self.down_proj_bias,
            activation=self.activation,
        )

    def projections(self) -> tuple[Projection, Projection]:
        """What a decoding step reads."""
        return Projection(self.up_proj, None, self.up_proj_bias), Projection(self.down_proj, None, self.down_proj_bias)


class Int8Experts(nn.Module):
    """Experts for inference with int8 weights, one scale an output row of each (weight-only, as Int8Linear)."""

    up_proj: Tensor
    down_proj: Tensor
    up_scale: Tensor
    down_scale: Tensor
    up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.activation = experts.activation
        for name in ("up", "down"):
            weight: Tensor = getattr(experts, f"{name}_proj")
            bias: Tensor | None = getattr(experts, f"{name}_proj_bias")
            quantized, scale = quantize_stack(weight)
            self.register_buffer(f"{name}_proj", quantized)
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_proj_bias", None if bias is None else bias.detach())

    def forward(self, tokens: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        """As Experts."""
        return grouped_mlp(
            tokens,
            expert_index,
            expert_weight,
            self.up_proj,
            self.down_proj,
            self.up_proj_bias,
            self.down_proj_bias,
            up_scale=self.up_scale,
            down_scale=self.down_scale,
            activation=self.activation,
        )

    def projections(self) -> tuple[Projection, Projection]:
        """What a decoding step reads."""
        up = Projection(self.up_proj, self.up_scale, self.up_proj_bias)
        return up, Projection(self.down_proj, self.down_scale, self.down_proj_bias)


def quantize_stack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of [.. o i], matrix by matrix: what is widened on the way is one of them at a time."""
    if weight.dim() == 2:
        return quantize_rows(weight)
    quantized = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    for matrix, rows, scales in zip(weight, quantized, scale, strict=True):
        rows[:], scales[:] = quantize_stack(matrix)
    return quantized, scale


class MoE(nn.Module):
    """Mixture-of-experts feed-forward layer: y_t = sum over the chosen k of p_tk E_k(x_t).

    p = softmax or sigmoid of the router's logits; the top_k largest are chosen, and p is divided by the sum of the
    chosen when `renormalize`. Two devices belong to training and are off in evaluation, where a token's output must
    not depend on the tokens beside or after it:
    - capacity_factor: an expert takes ceil(capacity_factor * tokens * top_k / num_experts) choices; later ones, in
      token order, are dropped and add nothing;
    - balancing="sinkhorn": experts are chosen from Sinkhorn-balanced logits; p stays the plain score.

    Args:
        hidden_size: width of input and output.
        config: experts and the router's semantics.

    Numerics: the router is float32 (float64 inputs stay float64), whatever autocast says.

    Example:
        >>> import torch
        >>> output, router = MoE(8, MoEConfig(num_experts=4, intermediate_size=16))(torch.randn(1, 3, 8))
        >>> output.shape, router.expert_share.shape
        (torch.Size([1, 3, 8]), torch.Size([4]))
    """

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(hidden_size, config.num_experts, bias=config.router_bias)
        self.experts: Experts | Int8Experts = Experts(hidden_size, config)

    def forward(self, hidden: Tensor, segments: Tensor | None = None) -> tuple[Tensor, RouterMetrics]:
        """hidden [b t h], segments [b t] (negative: padding) -> (output [b t h], what the router did)."""
        tokens = hidden.flatten(0, 1)
        real = None if segments is None else (segments >= 0).flatten()
        logits = self._logits(tokens)
        scores = logits.softmax(-1) if self.config.score_function == "softmax" else logits.sigmoid()
        chosen = self._choose(logits.detach(), real)
        weight = scores.gather(1, chosen)
        if self.config.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        if real is not None:
            chosen = chosen.masked_fill(~real[:, None], -1)
        served = chosen
        if self.training and self.config.capacity_factor is not None:
            served = drop_overflow(chosen, self.config.num_experts, self.config.capacity_factor)
        output = self.experts(tokens, served, weight)
        return output.view_as(hidden), RouterMetrics(logits, scores, chosen, served)

    def step_weights(self, norm: RMSNorm) -> FeedForwardWeights:
        """What a prepared decoding step of h + moe(norm(h)) reads."""
        config = self.config
        bias = self.router.bias if config.router_bias else None
        router = Router(self.router.weight, bias, config.top_k, config.score_function, config.renormalize)
        return FeedForwardWeights(norm.weight, norm.epsilon, *self.experts.projections(), config.activation, router)

    def _logits(self, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        bias = self.router.bias.to(dtype) if self.config.router_bias else None
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.linear(tokens.to(dtype), self.router.weight.to(dtype), bias)

    def _choose(self, logits: Tensor, real: Tensor | None) -> Tensor:
        if self.training and self.config.balancing == "sinkhorn":
            logits = sinkhorn(SINKHORN_SHARPNESS * logits, real, SINKHORN_ITERATIONS)
        return logits.topk(self.config.top_k, dim=-1).indices  # softmax and sigmoid keep the order of the logits
