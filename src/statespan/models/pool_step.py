"""How a decoder steps over memory that is given to it: the leading rows of a pool of states and pages."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from statespan.layers.attention import Attention
from statespan.layers.kv_cache import PagedKVCache
from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.rotary import rotary_angles
from statespan.layers.state import State
from statespan.models.mixer_step import convolved
from statespan.ops import paged_decode_attention
from statespan.ops.decode_attention.paged import append_token


class MemoryStep(Protocol):
    """The half of a block that has a state, over memory that was given."""

    @property
    def static(self) -> bool:
        """Whether a CUDA graph may hold it."""
        ...

    def __call__(self, hidden: Tensor) -> Tensor:
        """The residual stream [b h] after the mixer."""
        ...


class Held:
    """Any mixer by its own forward; the next state is copied to where the last one is."""

    static = False  # a CUDA graph may not hold it: the forward may wait for the device

    def __init__(self, layer: Mixer, norm: RMSNorm, state: State) -> None:
        self._layer, self._norm, self._state = layer, norm, state

    def __call__(self, hidden: Tensor) -> Tensor:
        mixed, after = self._layer(self._norm(hidden.unsqueeze(1)), self._state)
        assert after is not None  # a state went in
        new = after.tensors()
        for name, ours in self._state.tensors().items():
            ours.copy_(new[name])
        return hidden + mixed.squeeze(1)


class NextSlots:
    """Where the rows' next tokens go in paged memory: counted once a step, for all attention layers.

    Args:
        layer: any attention layer; they turn queries and keys alike.
        cache: its memory; all layers share table and length, which counts on here.
        active: [b] int32, 0 for an idle row: its token goes to page 0, and it sees nothing.
    """

    def __init__(self, layer: Attention, cache: PagedKVCache, active: Tensor) -> None:
        self._layer, self._cache, self._active = layer, cache, active
        self.table = cache.table  # [b m] pages of each token's row
        self.seen = torch.zeros_like(active)  # [b] slots, the new one included
        self.slot = torch.zeros_like(active, dtype=torch.int64)  # [b], of all pages' slots
        self.position = torch.zeros_like(active)  # [b] of the new tokens in their sequences
        self.angles: tuple[Tensor, Tensor] | None = None  # cos and sin [b r/2] of the new tokens

    def step(self) -> None:
        """Each row has a token more."""
        cache, size = self._cache, self._cache.page_size
        position = torch.mul(cache.length, self._active, out=self.position)
        page = cache.table.gather(1, (position // size).long().unsqueeze(1)).squeeze(1)
        torch.mul(page.long() * size + position % size, self._active, out=self.slot)
        torch.add(position, self._active, out=self.seen)
        cache.length.add_(self._active)
        self._turn()

    def _turn(self) -> None:
        """The angles of the tokens' places."""
        layer = self._layer
        if layer.config.rope_theta is not None:
            cos, sin = rotary_angles(self.position, layer.config, layer.head_dim)
            self.angles = cos.squeeze(1), sin.squeeze(1)


class PagedAttention:
    """Attention over pages of a pool, at the slots that `NextSlots` says.

    Args:
        layer: the attention layer.
        project: q, k and v [b ..] of the residual stream [b h], after the norm.
        cache: the layer's memory.
        slots: of all layers.
    """

    static = True

    def __init__(
        self, layer: Attention, project: Callable[[Tensor], Tensor], cache: PagedKVCache, slots: NextSlots
    ) -> None:
        self._layer, self._project, self._cache, self._slots = layer, project, cache, slots

    def __call__(self, hidden: Tensor) -> Tensor:
        layer, cache, slots = self._layer, self._cache, self._slots
        qkv = self._project(hidden)
        if cache.conv is not None:
            qkv = convolved(layer, qkv, cache.conv)
        interleaved = layer.config.rotary_interleaved
        query = append_token(qkv, cache.key, cache.value, slots.slot, slots.angles, interleaved=interleaved)
        mixed = paged_decode_attention(
            query, cache.key, cache.value, slots.table, slots.seen, sliding_window=layer.config.sliding_window
        )
        return hidden + layer.out_proj(mixed.flatten(1))
