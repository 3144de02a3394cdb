"""Normalisation layers."""

import torch
from torch import Tensor, nn

from statespan.ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467); statistics in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` [.. d]; the result has the weight's dtype, or autocast's."""
        return rms_norm(x, self.weight, eps=self.epsilon)

    def add(self, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of hidden + update [.. d], and that sum in hidden's dtype; one pass over both. None: no update."""
        if update is None:
            return self(hidden), hidden
        return rms_norm(update, self.weight, eps=self.epsilon, residual=hidden)


class GatedRMSNorm(nn.Module):
    """y = RMSNorm(x * silu(z)), or RMSNorm(x) * silu(z) with norm_before_gate (Mamba-2, arXiv 2405.21060)."""

    def __init__(self, size: int, epsilon: float, *, num_groups: int = 1, norm_before_gate: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon
        self.group_size = size // num_groups
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Normalise groups of the last dimension of `x` [.. d], gated by `z` [.. d]."""
        return gated_rms_norm(
            x,
            z,
            self.weight,
            eps=self.epsilon,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )
