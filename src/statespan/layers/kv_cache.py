"""Keys and values of attention mixers: a buffer that grows, and pages that many sequences share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from statespan.layers.state import State


@dataclass
class _Fill:
    """How many slots of a shared buffer are written; lets only the newest holder append in place."""

    count: int = 0


@dataclass(frozen=True)
class KVCache(State):
    """Keys and values of an attention mixer, in a buffer with room to grow; the first `length` slots are in use.

    Slots are shared by the whole batch; where a slot is padding for a row, or belongs to an earlier packed segment,
    its position is -1 and it is never attended. Appending writes behind `length`, so an older cache stays valid; if
    another cache has already appended behind it, the buffer is copied first.
    """

    key: Tensor  # [b capacity kv_heads head_dim]
    value: Tensor  # [b capacity kv_heads head_dim]
    position: Tensor  # [b capacity] int32, place of the slot's token in its sequence, or -1: not visible
    next_position: Tensor  # [b] int32, position of the row's next token
    conv: Tensor | None = None  # [b conv_kernel-1 channels], where the layer has a conv over q, k and v
    length: int = 0  # slots in use
    dropped: int = 0  # slots let go because no row saw them any more
    dense: bool = True  # every row sees every slot: no padding or packing so far
    fill: _Fill = field(default_factory=_Fill, repr=False, compare=False)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.key.shape[2:])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        mapped = super().map(function)
        return replace(mapped, fill=_Fill(self.fill.count))

    def append(self, key: Tensor, value: Tensor, position: Tensor, *, window: int | None = None) -> Self:
        """The cache with slots for `key`, `value` [b t kv_heads head_dim] at `position` [b t] added.

        Whenever the buffer has to grow, slots are let go that no row's later tokens can see: what a window has left
        behind, padding, and packed documents that have ended.
        """
        length = self.length + key.shape[1]
        if torch.is_grad_enabled():
            return self._concatenated(key, value, position)
        cache = self
        if length > self.key.shape[1] or self.fill.count != self.length:
            cache = self._with_room(key.shape[1], window)
            length = cache.length + key.shape[1]
        new = slice(cache.length, length)
        cache.key[:, new], cache.value[:, new], cache.position[:, new] = key, value, position
        cache.fill.count = length
        return replace(cache, length=length)

    def _concatenated(self, key: Tensor, value: Tensor, position: Tensor) -> Self:
        """Append without writing in place, so that autograd can follow."""
        joined = {
            "key": torch.cat([self.key[:, : self.length], key], dim=1),
            "value": torch.cat([self.value[:, : self.length], value], dim=1),
            "position": torch.cat([self.position[:, : self.length], position.to(torch.int32)], dim=1),
        }
        length = self.length + key.shape[1]
        return replace(self, **joined, length=length, fill=_Fill(length))

    def _with_room(self, extra: int, window: int | None) -> Self:
        """A copy in a buffer with room for `extra` slots and a half more, without those that no row sees any more."""
        kept: Tensor | slice = slice(0, self.length)
        length = self.length
        if window is not None or not self.dense:
            kept = self._visible(window).any(dim=0).nonzero().squeeze(1)
            length = len(kept)
        capacity = max(64, (length + extra) * 3 // 2)

        def grown(buffer: Tensor) -> Tensor:
            out = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
            out[:, :length] = buffer[:, kept]
            return out

        return replace(
            self,
            key=grown(self.key),
            value=grown(self.value),
            position=grown(self.position),
            length=length,
            dropped=self.dropped + self.length - length,
            fill=_Fill(length),
        )

    def _visible(self, window: int | None) -> Tensor:
        """[b length] bool: the slots that the row's next token sees."""
        used = self.position[:, : self.length]
        seen = used >= 0
        return seen if window is None else seen & (used > self.next_position.unsqueeze(1) - window)


@dataclass(frozen=True)
class PagedKVCache(State):
    """Keys and values of an attention mixer in pages that many sequences share; see serving.StatePool.

    The key of a row's token s is key[table[row, s // page_size], s % page_size]. Forward writes new tokens behind
    `length` into the pages, where they must be the row's own; what it returns knows of them, and an older value does
    not. Page 0 is nobody's and takes what padding writes. The rows' operations (clone, select, to) leave pages alone.
    """

    key: Tensor  # [pages page_size kv_heads head_dim], the pool's
    value: Tensor  # [pages page_size kv_heads head_dim]
    table: Tensor  # [b m] int32, the pages of each row in order
    length: Tensor  # [b] int32, tokens of each row
    conv: Tensor | None = None  # [b conv_kernel-1 channels], where the layer has a conv over q, k and v
    longest: int = 0  # no row has more tokens; known without asking the device
    dense: bool = True  # every row has that many
    first_page: int | None = None  # the pages of the one row there is follow each other from this one on

    def tensors(self) -> dict[str, Tensor]:
        """Those that have the batch as their first dimension."""
        return {name: tensor for name, tensor in super().tensors().items() if name not in ("key", "value")}

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.key.shape[2:])

    @property
    def kind(self) -> type[State]:
        return KVCache

    @property
    def page_size(self) -> int:
        return self.key.shape[1]

    def write(self, key: Tensor, value: Tensor, position: Tensor, real: Tensor | None) -> None:
        """Put `key`, `value` [b t kv_heads head_dim] at `position` ([t] or [b t]); where not `real` [b t], nowhere."""
        position = position.expand(key.shape[:2])
        if real is not None:
            position = position.clamp(max=self.table.shape[1] * self.page_size - 1)
        page = self.table.gather(1, position // self.page_size).long()
        slot = page * self.page_size + position % self.page_size
        slot = (slot if real is None else torch.where(real, slot, 0)).flatten()
        for pages, new in ((self.key, key), (self.value, value)):
            pages.flatten(0, 1).index_copy_(0, slot, new.flatten(0, 1).to(pages.dtype))

    def read(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values [b num_tokens kv_heads head_dim] of each row's first tokens, in order."""
        count = -(-num_tokens // self.page_size)
        if self.first_page is not None and len(self.table) == 1:  # no copies
            part = slice(self.first_page, self.first_page + count)
            key, value = (pages[part].flatten(0, 1)[None, :num_tokens] for pages in (self.key, self.value))
            return key, value
        table = self.table[:, :count]
        key, value = (pages[table].flatten(1, 2)[:, :num_tokens] for pages in (self.key, self.value))
        return key, value
