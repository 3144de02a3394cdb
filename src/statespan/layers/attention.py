"""Causal grouped-query attention with optional rotary positions, sliding window and a conv over q, k and v."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.layers.causal_attention import causal_attention, masked_attention, sees
from statespan.layers.config import AttentionConfig
from statespan.layers.kv_cache import KVCache, PagedKVCache
from statespan.layers.linear import Linear
from statespan.layers.mixer import Mixer
from statespan.layers.rotary import rotary_angles
from statespan.layers.token_layout import TokenLayout, token_layout
from statespan.ops import causal_conv1d
from statespan.ops.rotary import rotate


class Attention(Mixer):
    """softmax(q k^T / sqrt(head_dim)) v over the visible past (arXiv 1706.03762); q, k and v from one projection."""

    def __init__(self, hidden_size: int, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads()
        self.head_dim = config.head_size(hidden_size)
        qkv_size = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(hidden_size, qkv_size, bias=config.qkv_bias)
        if config.conv_kernel:
            self.conv1d = nn.Conv1d(qkv_size, qkv_size, config.conv_kernel, groups=qkv_size)
        self.out_proj = Linear(self.num_heads * self.head_dim, hidden_size, bias=config.out_bias)
        if config.learned_positions is not None:
            self.position_embedding = nn.Embedding(config.learned_positions, hidden_size)

    def forward(
        self, hidden: Tensor, state: KVCache | PagedKVCache | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, KVCache | PagedKVCache | None]:
        layout = None if segments is None else token_layout(segments)
        position = self._positions(hidden, state, layout)
        query, key, value, conv = self._project(self.placed(hidden, position), state, segments)
        if self.config.rope_theta is not None:
            cos, sin = rotary_angles(position, self.config, self.head_dim)
            query = rotate(query, cos, sin, interleaved=self.config.rotary_interleaved)
            key = rotate(key, cos, sin, interleaved=self.config.rotary_interleaved)
        after: KVCache | PagedKVCache | None = None
        if state is None:
            mixed = self._attend(query, key, value, position, layout, None)
        elif isinstance(state, PagedKVCache):
            mixed, after = self._attend_pages(query, key, value, position, layout, state)
            after = replace(after, conv=conv)
        else:
            cache = self._extend(state, key, value, position, layout)
            used = slice(0, cache.length)
            mixed = self._attend(query, cache.key[:, used], cache.value[:, used], position, layout, cache)
            after = self._next(cache, position, layout, conv)
        return self._output(mixed, layout), after

    def placed(self, hidden: Tensor, position: Tensor) -> Tensor:
        """`hidden` [.. h] with the learnt vectors of the positions [..] where the layer has such.

        A position beyond the table raises UserError; on a GPU it gives NaN, since nothing waits for the device.
        """
        size = self.config.learned_positions
        if size is None:
            return hidden
        if not torch.compiler.is_compiling() and position.device.type == "cpu" and bool((position >= size).any()):
            raise UserError(
                f"the text has {int(position.max()) + 1} tokens, more than attention.learned_positions={size}"
            )
        vectors = self.position_embedding(position.clamp(0, size - 1))
        return hidden + torch.where((position < size).unsqueeze(-1), vectors, torch.nan).to(hidden.dtype)

    def _project(
        self, hidden: Tensor, state: KVCache | PagedKVCache | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v [b t heads head_dim] and the conv's next state."""
        qkv, conv = self.qkv_proj(hidden), None
        if self.config.conv_kernel:
            qkv, conv = causal_conv1d(
                qkv,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation=None,
                initial_state=None if state is None else state.conv,
                segments=segments,
                return_final_state=True,
            )
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        query, key, value = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        return query, key, value, conv

    def _positions(self, hidden: Tensor, state: KVCache | PagedKVCache | None, layout: TokenLayout | None) -> Tensor:
        """Position of each token in its sequence: [t] where all rows agree, else [b t]."""
        if layout is None and (state is None or state.dense):
            start = 0
            if state is not None:
                start = state.longest if isinstance(state, PagedKVCache) else state.dropped + state.length
            return torch.arange(start, start + hidden.shape[1], device=hidden.device)
        if layout is None:
            index = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            layout = TokenLayout(torch.ones_like(index, dtype=torch.bool), torch.zeros_like(index), index, index[:, 0])
        if state is None:
            return layout.index
        old = state.length if isinstance(state, PagedKVCache) else state.next_position
        return layout.index + torch.where(layout.run == 0, old.unsqueeze(1), 0)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        layout: TokenLayout | None,
        cache: KVCache | None,
    ) -> Tensor:
        """[b t heads head_dim]: to the tokens themselves, or to the cache that holds them."""
        window = self.config.sliding_window
        if layout is None and (cache is None or cache.dense):
            return causal_attention(query, key, value, window)
        batch_positions = position.expand(-1 if position.dim() == 2 else 1, -1)
        slot = batch_positions if cache is None else cache.position[:, : cache.length]
        old = slot.shape[1] - position.shape[-1]
        slot_run = None if layout is None else F.pad(layout.run, (old, 0))
        index = torch.arange(slot.shape[1], device=slot.device)

        def seen(tokens: slice) -> Tensor:
            visible = sees(batch_positions[:, tokens], slot, window) & (slot >= 0).unsqueeze(1)
            if layout is None or slot_run is None:
                return visible
            visible &= slot_run.unsqueeze(1) == layout.run[:, tokens].unsqueeze(2)
            # A padding token sees itself alone: its output is thrown away, and no row of the softmax is empty.
            itself = index == index[old:][tokens].unsqueeze(1)
            return torch.where(layout.real[:, tokens].unsqueeze(2), visible, itself)

        return masked_attention(query, key, value, seen)

    def _attend_pages(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor,
        layout: TokenLayout | None,
        cache: PagedKVCache,
    ) -> tuple[Tensor, PagedKVCache]:
        """Write the tokens to the pages and attend to these: [b t heads head_dim], and the cache with them."""
        window, num_tokens = self.config.sliding_window, query.shape[1]
        longest = min(cache.longest + num_tokens, cache.table.shape[1] * cache.page_size)
        if layout is None:
            added: Tensor | int = num_tokens
            cache.write(key, value, position, None)
        else:
            if not torch.compiler.is_compiling() and position.device.type == "cpu" and bool((layout.run > 0).any()):
                raise UserError("attention: a row of paged memory is one sequence; segments may only mark padding")
            added = layout.real.sum(dim=1, dtype=torch.int32)
            cache.write(key, value, position, layout.real)
        length = cache.length + added
        key, value = cache.read(longest)
        after = replace(cache, length=length, longest=longest, dense=cache.dense and layout is None)
        if after.dense:
            return causal_attention(query, key, value, window), after
        index = torch.arange(longest, device=position.device)
        used = index < length.unsqueeze(1)
        if window is not None:
            used = used & (index > cache.length.unsqueeze(1) - window)
        used = used[..., None, None]
        # What other sequences left in a page must not even be multiplied by zero.
        key, value = torch.where(used, key, 0), torch.where(used, value, 0)

        def seen(tokens: slice) -> Tensor:
            visible = sees(position[:, tokens], index, window)
            return visible if layout is None else visible | ~layout.real[:, tokens].unsqueeze(2)

        return masked_attention(query, key, value, seen), after

    def _output(self, mixed: Tensor, layout: TokenLayout | None) -> Tensor:
        mixed = mixed.flatten(2)
        if layout is not None:
            mixed = torch.where(layout.real.unsqueeze(-1), mixed, 0)
        return self.out_proj(mixed)

    def _extend(
        self, state: KVCache, key: Tensor, value: Tensor, position: Tensor, layout: TokenLayout | None
    ) -> KVCache:
        slots = position.expand(key.shape[:2])
        if layout is not None:
            slots = torch.where(layout.real, slots, -1)
            state = replace(state, dense=False)
        return state.append(key, value, slots, window=self.config.sliding_window)

    def _next(self, cache: KVCache, position: Tensor, layout: TokenLayout | None, conv: Tensor | None) -> KVCache:
        """The cache that the next call sees: only the row's last segment stays visible."""
        if layout is None:
            return replace(cache, next_position=cache.next_position + position.shape[-1], conv=conv)
        old = cache.length - layout.run.shape[1]
        slot_run = torch.cat([layout.run.new_zeros(layout.run.shape[0], old), layout.run], dim=1)
        used = cache.position[:, : cache.length]
        visible = torch.where(slot_run == layout.last_run.unsqueeze(1), used, -1)
        hidden_slots = cache.position.clone()
        hidden_slots[:, : cache.length] = visible
        # Counted, not read off the slots: a sliding window may have dropped them all.
        added = ((layout.run == layout.last_run.unsqueeze(1)) & layout.real).sum(dim=1, dtype=torch.int32)
        start = torch.where(layout.last_run == 0, cache.next_position, 0)
        return replace(cache, position=hidden_slots, next_position=(start + added).to(torch.int32), conv=conv)

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> KVCache:
        buffer = torch.zeros(batch_size, 0, self.num_kv_heads, self.head_dim, device=device, dtype=dtype)
        counts = torch.zeros(batch_size, dtype=torch.int32, device=device)
        conv = None
        if self.config.conv_kernel:
            channels = self.qkv_proj.out_features
            conv = torch.zeros(batch_size, self.config.conv_kernel - 1, channels, device=device, dtype=dtype)
        return KVCache(buffer, buffer.clone(), counts.new_zeros(batch_size, 0), counts, conv)
