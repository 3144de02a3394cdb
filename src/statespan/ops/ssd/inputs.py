"""The arguments of `statespan.ops.ssd`, named once for every backend."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The tensors; shapes in the docstring of `statespan.ops.ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    segments: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """All but segments."""
        return self.x, self.dt, self.A, self.B, self.C, self.D, self.dt_bias, self.initial_state

    @property
    def sum_dtype(self) -> torch.dtype:
        """What decays, sums and states are computed in: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.x.dtype, torch.float32)


@dataclass(frozen=True)
class Options:
    """All other arguments that a backend needs."""

    dt_softplus: bool
    dt_limit: tuple[float, float]
    chunk_size: int
    discretization: str
