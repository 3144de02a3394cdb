"""Typed states of the mixers. A state is a value: forward takes one, returns the next, and changes none."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


class State:
    """What every state can do: be cloned, moved, and have rows of its batch picked."""

    def tensors(self) -> dict[str, Tensor]:
        """The state's tensors by field name; each has the batch as its first dimension."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}  # type: ignore[arg-type]  # every State is a dataclass

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state with the function applied to each of its tensors."""
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})  # type: ignore[type-var]  # every State is a dataclass

    def clone(self) -> Self:
        """A copy that shares no memory."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """The same values outside the autograd graph (truncated back-propagation)."""
        return self.map(torch.detach)

    def to(self, device: torch.device | str) -> Self:
        """The state on another device; dtypes stay."""
        return self.map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> Self:
        """The state of chosen batch rows, in the order given; a row may repeat (forking)."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row's main tensor; tells states of different models apart."""
        raise NotImplementedError

    @property
    def kind(self) -> "type[State]":
        """The class that the mixer's `new_state` makes."""
        return type(self)

    @property
    def num_bytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


@dataclass(frozen=True)
class SSMState(State):
    """State of a Mamba mixer."""

    conv: Tensor  # [b conv_kernel-1 channels], the newest inputs of the causal conv, oldest first
    ssm: Tensor  # float32; Mamba-1 [b d n], Mamba-2 [b h p n]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.ssm.shape[1:])


@dataclass(frozen=True)
class LTIState(State):
    """State of an S4, S4D or LSSL mixer."""

    conv: Tensor  # [b conv_kernel-1 d], the newest inputs of the block's conv, oldest first; [b 0 d] without one
    ssm: Tensor  # [b d n] float32, real and imaginary parts in turns where the system is complex

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.ssm.shape[1:])


@dataclass(frozen=True)
class RecurrentState(State):
    """State of an LSTM or GRU mixer."""

    hidden: Tensor  # [b hidden]
    cell: Tensor | None = None  # [b hidden], LSTM only

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[1:])


@dataclass(frozen=True)
class ModelState:
    """The states of all layers of a model, one entry a layer (None for a layer without a mixer)."""

    layers: tuple[State | None, ...]

    def _map(self, function: Callable[[State], State]) -> "ModelState":
        return ModelState(tuple(None if layer is None else function(layer) for layer in self.layers))

    def clone(self) -> "ModelState":
        """A copy that shares no memory."""
        return self._map(lambda layer: layer.clone())

    def detach(self) -> "ModelState":
        """The same values outside the autograd graph (truncated back-propagation)."""
        return self._map(lambda layer: layer.detach())

    def to(self, device: torch.device | str) -> "ModelState":
        """The state on another device."""
        return self._map(lambda layer: layer.to(device))

    def select(self, rows: Tensor) -> "ModelState":
        """The state of chosen batch rows, in the order given; a row may repeat (forking)."""
        return self._map(lambda layer: layer.select(rows))

    @property
    def num_bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.num_bytes for layer in self.layers if layer is not None)

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        for layer in self.layers:
            for tensor in layer.tensors().values() if layer is not None else ():
                return tensor.shape[0]
        return 0
