"""The contract of a mixer: the half of a block that moves information between tokens."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from statespan.layers.float32 import KeepFloat32
from statespan.layers.norm import RMSNorm
from statespan.layers.state import State
from statespan.ops.decode_step import Mamba1Weights, Mamba2Weights


class Mixer(KeepFloat32):
    """A sequence mixer with explicit state.

    `forward(hidden, state, segments) -> (hidden, state)`: without a state it starts from zero and returns None for it;
    with one it continues and returns the next. Segments follow docs/architecture.md: a change restarts, a negative
    number is padding.
    """

    # Where norm, projections and mixer run as one op: for the backward, or computed again in it.
    keep_projected, keep_convolved, keep_cast = True, False, False

    @abstractmethod
    def forward(self, hidden: Tensor, state: Any = None, segments: Tensor | None = None) -> tuple[Tensor, State | None]:
        """Mix `hidden` [b t h] over t."""

    def add_and_mix(
        self,
        norm: RMSNorm,
        hidden: Tensor,
        update: Tensor | None,
        state: Any = None,
        segments: Tensor | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None, State | None]:
        """h = hidden + update [b t h], the mixer's output for norm(h), and the next state.

        Or their sum, None, and the state: a product may be added where h lies. With `overwrite` h may be hidden itself.
        """
        normed, hidden = norm.add(hidden, update)
        output, state = self(normed, state, segments)
        return hidden, output, state

    def step_weights(self, norm: RMSNorm) -> Mamba1Weights | Mamba2Weights | None:
        """What a prepared decoding step of h + mixer(norm(h)) reads; None: this mixer has no such step."""
        return None

    @abstractmethod
    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token; `dtype` is that of the activations (the SSM part is float32)."""
