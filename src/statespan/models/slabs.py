"""Slabs: the constant states of all layers, those of one shape in one tensor, so that a row is one copy or two."""

from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.state import ModelState, State
from statespan.models.transfer import to_device


class Slabs:
    """Memory [layers rows ...] for each shape of state.

    Args:
        layers: for each layer the tensors of its state by field, the batch as first dimension; only their shapes count.
        num_rows: of the memory.
    """

    def __init__(self, layers: Sequence[dict[str, Tensor]], num_rows: int, device: torch.device) -> None:
        self.num_rows, self.device = num_rows, device
        places: dict[tuple[torch.Size, torch.dtype], list[tuple[int, str]]] = defaultdict(list)
        for index, tensors in enumerate(layers):
            for field, tensor in tensors.items():
                places[tensor.shape[1:], tensor.dtype].append((index, field))
        self._places = list(places.values())
        # One for each shape and dtype, [layers rows ...].
        self.tensors = [
            torch.zeros(len(users), num_rows, *shape, dtype=dtype, device=device)
            for (shape, dtype), users in places.items()
        ]
        self._num_layers = len(layers)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def by_layer(self) -> list[dict[str, Tensor]]:
        """The memory of all rows of each layer's state, by field."""
        return self._by_layer(self.tensors)

    def clone(self) -> "Slabs":
        """A copy that shares no memory."""
        other = copy(self)
        other.tensors = [tensor.clone() for tensor in self.tensors]
        return other

    def read(self, rows: Sequence[int], fresh: Sequence[int]) -> list[dict[str, Tensor]]:
        """Copies of these rows for each layer, by field; zeros in those whose places are in `fresh`."""
        copies = self.gather(rows)
        for tensor in copies if fresh else ():
            tensor.index_fill_(1, self._index(fresh), 0)
        return self._by_layer(copies)

    def gather(self, rows: Sequence[int]) -> list[Tensor]:
        """Copies of these rows, for `scatter`."""
        index = self._index(rows)
        return [tensor.index_select(1, index) for tensor in self.tensors]

    def leading(self, count: int) -> list[Tensor]:
        """Copies of the first rows."""
        return [tensor[:, :count].clone() for tensor in self.tensors]

    def scatter(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Overwrite these rows by what `gather` gave."""
        index = self._index(rows)
        for ours, new in zip(self.tensors, tensors, strict=True):
            ours.index_copy_(1, index, new)

    def write(self, rows: Sequence[int], layers: Sequence[State | None]) -> None:
        """Overwrite these rows by the states of all layers."""
        index = self._index(rows)
        for tensor, users in zip(self.tensors, self._places, strict=True):
            states = [getattr(layers[layer], field) for layer, field in users]
            if len(rows) == 1:  # one launch in place of one a layer; of many rows the copy would be large
                tensor.index_copy_(1, index, torch.stack(states))
            else:
                for ours, new in zip(tensor, states, strict=True):
                    ours.index_copy_(0, index, new)

    def fill(self, layers: Sequence[State | None]) -> None:
        """Overwrite all rows by the states of all layers."""
        for tensor, users in zip(self.tensors, self._places, strict=True):
            torch.stack([getattr(layers[layer], field) for layer, field in users], out=tensor)

    def copy_to(self, other: "Slabs", first: int, count: int) -> None:
        """The first `count` rows, to another memory of the same states, from a row on."""
        for ours, theirs in zip(self.tensors, other.tensors, strict=True):
            theirs[:, first : first + count].copy_(ours[:, :count])

    def take_rows(self, rows: Sequence[int], other: "Slabs", sources: Sequence[int]) -> None:
        """Overwrite these rows by rows of another memory of the same states."""
        leading = list(rows) == list(range(len(rows)))  # written at once, at half the bytes
        index = to_device(torch.tensor([rows, sources]), torch.int64, self.device)
        for ours, theirs in zip(self.tensors, other.tensors, strict=True):
            if leading:
                torch.index_select(theirs, 1, index[1], out=ours[:, : len(rows)])
            else:
                ours.index_copy_(1, index[0], theirs.index_select(1, index[1]))

    def copy(self, source: int, target: int) -> None:
        for tensor in self.tensors:
            tensor[:, target] = tensor[:, source]

    def zero(self, row: int) -> None:
        for tensor in self.tensors:
            tensor[:, row] = 0

    def take(self, row: int, fresh: bool) -> tuple[Tensor, ...]:
        """Copies of a row, or zeros."""
        return tuple(torch.zeros_like(x[:, row]) if fresh else x[:, row].clone() for x in self.tensors)

    def put(self, row: int, tensors: Sequence[Tensor]) -> None:
        """Overwrite a row by what `take` gave."""
        for ours, new in zip(self.tensors, tensors, strict=True):
            ours[:, row] = new

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise UserError unless the tensors could come from `take`."""
        for number, (ours, given) in enumerate(zip(self.tensors, tensors, strict=True)):
            wanted = (*ours.shape[:1], *ours.shape[2:])
            if given.shape != wanted or given.dtype != ours.dtype:
                raise UserError(
                    f"state {number} of a snapshot is {list(given.shape)} {given.dtype}, and this model's"
                    f" {list(wanted)} {ours.dtype}"
                )

    def __len__(self) -> int:
        return len(self.tensors)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return to_device(rows, torch.int64, self.device)

    def _by_layer(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        layers: list[dict[str, Tensor]] = [{} for _ in range(self._num_layers)]
        for tensor, users in zip(tensors, self._places, strict=True):
            for part, (layer, field) in zip(tensor, users, strict=True):
                layers[layer][field] = part
        return layers


def states_in(slabs: Slabs, layers: Sequence[State | None], count: int | None = None) -> ModelState:
    """The states of the first `count` rows of such memory, which is not copied, in the form of those of `layers`."""
    states: list[State | None] = []
    for layer, memory in zip(layers, slabs.by_layer(), strict=True):
        tensors = memory if count is None else {name: tensor[:count] for name, tensor in memory.items()}
        states.append(replace(layer, **tensors) if layer is not None and tensors else None)  # type: ignore[type-var]  # a dataclass
    return ModelState(tuple(states))
