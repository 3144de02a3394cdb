"""Snapshots: what a row of a StatePool was at one moment."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A row at one moment: copies of its constant states, and its pages, which the snapshot holds too.

    Pages that a sliding window has left behind are not among them.
    """

    num_tokens: int
    tensors: tuple[Tensor, ...]  # one a slab of the pool: [layers ...]
    pages: tuple[int, ...]
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of both; pages are counted whole, also where others hold them."""
        return sum(tensor.nbytes for tensor in self.tensors) + len(self.pages) * self.page_bytes


@dataclass(frozen=True, eq=False)
class Mark:
    """The first rows of a pool at one moment: copies of their constant states, and how many tokens they had."""

    tensors: Sequence[Tensor]  # one a slab of the pool: [layers rows ...]
    num_tokens: tuple[int, ...]
