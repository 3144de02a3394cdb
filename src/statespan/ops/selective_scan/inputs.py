"""The arguments of `statespan.ops.selective_scan`, named once for every backend."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors; shapes in the docstring of `statespan.ops.selective_scan`."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    segments: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """All but segments."""
        return self.u, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial_state


class Options(NamedTuple):
    """All other arguments that a backend needs."""

    dt_softplus: bool
    discretization: str
