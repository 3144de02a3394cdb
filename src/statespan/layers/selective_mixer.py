"""What Mamba-1 and Mamba-2 share: the projections around conv and recurrence, and how these run together."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from statespan.layers.linear import Linear
from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.state import SSMState, State
from statespan.ops.linear import add_product


class SelectiveMixer(Mixer):
    """out_proj(mix(in_proj(h))), with a step for a single token and one op for training on a GPU."""

    float32_parameters = ("A_log", "D", "dt_bias")
    projections: ClassVar[tuple[str, ...]]  # names of the linear layers
    in_proj: Linear
    out_proj: Linear

    @abstractmethod
    def _mix(
        self, projected: Tensor, /, state: SSMState | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What out_proj is fed from in_proj's output, and the next conv and SSM state."""

    @abstractmethod
    def _step(self, hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        """The same for one token [b 1 h], with both projections."""

    @abstractmethod
    def _add_and_mix_at_once(
        self, norm: RMSNorm, hidden: Tensor, update: Tensor | None, state: SSMState | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, State | None]:
        """`add_and_mix` as one op."""

    def forward(
        self, hidden: Tensor, state: SSMState | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, SSMState | None]:
        if state is not None and hidden.shape[1] == 1 and segments is None and not torch.is_grad_enabled():
            return self._step(hidden, state)
        y, conv, ssm = self._mix(self.in_proj(hidden), state, segments)
        return self.out_proj(y), None if state is None else SSMState(conv, ssm)

    def add_and_mix(
        self,
        norm: RMSNorm,
        hidden: Tensor,
        update: Tensor | None,
        state: SSMState | None = None,
        segments: Tensor | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """On a GPU, if projections are plain, neither quantized nor wrapped by an adapter: one op where gradients are
        wanted, otherwise out_proj adds to the stream; a CPU gains nothing by either."""
        plain = all(type(getattr(self, name)) is Linear for name in self.projections)
        if not (plain and hidden.is_cuda):
            return super().add_and_mix(norm, hidden, update, state, segments, overwrite)
        if torch.is_grad_enabled():
            return self._add_and_mix_at_once(norm, hidden, update, state, segments)
        biased = self.out_proj.bias is not None  # pyright: ignore[reportUnnecessaryComparison]  # PyTorch's types forget None
        if hidden.shape[1] == 1 or biased or (update is None and not overwrite):
            return super().add_and_mix(norm, hidden, update, state, segments, overwrite)
        return self._mix_and_add(norm, hidden, update, state, segments)

    def _mix_and_add(
        self, norm: RMSNorm, hidden: Tensor, update: Tensor | None, state: SSMState | None, segments: Tensor | None
    ) -> tuple[Tensor, None, State | None]:
        normed, total = norm.add(hidden, update)
        y, conv, ssm = self._mix(self.in_proj(normed), state, segments)
        add_product(total.view(-1, total.shape[-1]), y.flatten(0, 1), self.out_proj.weight.T)
        return total, None, None if state is None else SSMState(conv, ssm)
