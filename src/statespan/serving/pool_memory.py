"""PoolMemory: the tensors behind a StatePool: constant states in rows, keys and values in pages, of all layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.kv_cache import KVCache, PagedKVCache
from statespan.layers.state import State
from statespan.models.language_model import LanguageModel
from statespan.models.slabs import Slabs


class PoolMemory:
    """Memory for the states of one model.

    Args:
        model: whose states they are.
        num_rows: of the constant states.
        num_pages: of keys and values.
        page_size: tokens of a page.
    """

    def __init__(self, model: LanguageModel, num_rows: int, num_pages: int, page_size: int) -> None:
        self.device = model.device
        self._states = model.new_state(0).layers
        self._constants = [_constant(state) for state in self._states]
        self.slabs = self.new_slabs(num_rows)
        caches = [state for state in self._states if isinstance(state, KVCache)]
        self.has_pages = bool(caches)
        shape = (num_pages, page_size, *(caches[0].row_shape if caches else (0, 0)))
        # [2 layers, pages ...]: a page of all layers is copied at once.
        self.kv = torch.zeros(2 * len(caches), *shape, dtype=model.dtype, device=self.device)
        self.page_bytes = self.kv[:, 0].nbytes

    @property
    def num_bytes(self) -> int:
        """Of all rows and pages."""
        return self.slabs.num_bytes + self.kv.nbytes

    def new_slabs(self, count: int) -> Slabs:
        """Memory of its own for `count` constant states."""
        return Slabs(self._constants, count, self.device)

    def layers(self, table: Tensor, length: Tensor) -> list[State | None]:
        """Each layer's memory of all rows, whose pages [b m] and tokens [b] these are."""
        layers: list[State | None] = []
        pairs = iter(self.kv.unflatten(0, (-1, 2)))
        for state, constant in zip(self._states, self.slabs.by_layer(), strict=True):
            if isinstance(state, KVCache):
                key, value = next(pairs)
                layers.append(PagedKVCache(key, value, table, length, constant.get("conv")))
            else:
                layers.append(None if state is None else replace(state, **constant))  # type: ignore[type-var]  # a dataclass
        return layers

    def copy_page(self, source: int, target: int) -> None:
        self.kv[:, target] = self.kv[:, source]

    def to_host(self, pages: Sequence[int]) -> Tensor:
        """A copy of these pages [2 layers, pages ...] in CPU memory."""
        return self.kv.index_select(1, torch.tensor(pages, dtype=torch.int64, device=self.device)).cpu()

    def check_pages(self, stored: Tensor, count: int) -> None:
        """Raise UserError unless `stored` holds `count` pages of this model and page size."""
        wanted = (self.kv.shape[0], count, *self.kv.shape[2:])
        if stored.shape != wanted or stored.dtype != self.kv.dtype:
            raise UserError(
                f"pages of a snapshot are {list(stored.shape)} {stored.dtype}, and here {list(wanted)} {self.kv.dtype}"
            )

    def from_host(self, pages: Sequence[int], stored: Tensor) -> None:
        """Fill these pages."""
        self.kv[:, torch.tensor(pages, dtype=torch.int64, device=self.device)] = stored.to(self.device)


def _constant(state: State | None) -> dict[str, Tensor]:
    """The tensors of a layer that do not grow with the sequence."""
    if state is None:
        return {}
    if isinstance(state, KVCache):
        return {} if state.conv is None else {"conv": state.conv}
    return state.tensors()


def padded_rows(num_rows: int, device: torch.device) -> int:
    """Rows of memory: on a GPU a step may run on more rows than are in use (see `bucket`)."""
    return bucket(num_rows) if device.type == "cuda" else num_rows


def bucket(num_rows: int) -> int:
    """The number of rows of a step that so many take part in: 1, 2, 4, 8, 16, and then multiples of 16."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 16 else -(-num_rows // 16) * 16
