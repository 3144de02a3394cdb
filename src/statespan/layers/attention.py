"""Causal grouped-query attention with optional rotary positions, sliding window and a conv over q, k and v."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statespan.layers.config import AttentionConfig
from statespan.layers.linear import Linear
from statespan.layers.mixer import Mixer
from statespan.layers.rotary import rotary_angles, rotate
from statespan.layers.state import KVCache
from statespan.layers.token_layout import TokenLayout, token_layout
from statespan.ops import causal_conv1d


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

    def forward(
        self, hidden: Tensor, state: KVCache | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        layout = None if segments is None else token_layout(segments)
        query, key, value, conv = self._project(hidden, state, segments)
        position = self._positions(hidden, state, layout)
        if self.config.rope_theta is not None:
            cos, sin = rotary_angles(position, self.config, self.head_dim)
            query = rotate(query, cos, sin, interleaved=self.config.rotary_interleaved)
            key = rotate(key, cos, sin, interleaved=self.config.rotary_interleaved)
        if state is None:
            mixed = self._attend(query, key, value, self._mask(position, layout, None))
            return self._output(mixed, layout), None
        cache = self._extend(state, key, value, position, layout)
        length = cache.length
        mask = self._mask(position, layout, cache)
        mixed = self._attend(query, cache.key[:, :length], cache.value[:, :length], mask)
        return self._output(mixed, layout), self._next(cache, position, layout, conv)

    def _project(
        self, hidden: Tensor, state: KVCache | None, segments: Tensor | None
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

    def _positions(self, hidden: Tensor, state: KVCache | None, layout: TokenLayout | None) -> Tensor:
        """Position of each token in its sequence: [t] where all rows agree, else [b t]."""
        if layout is None and (state is None or state.dense):
            start = 0 if state is None else state.dropped + state.length
            return torch.arange(start, start + hidden.shape[1], device=hidden.device)
        if layout is None:
            index = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            layout = TokenLayout(torch.ones_like(index, dtype=torch.bool), torch.zeros_like(index), index, index[:, 0])
        if state is None:
            return layout.index
        return layout.index + torch.where(layout.run == 0, state.next_position.unsqueeze(1), 0)

    def _mask(self, position: Tensor, layout: TokenLayout | None, cache: KVCache | None) -> Tensor | None:
        """Which slots each token sees: [t s] or [b 1 t s] bool; None: plain causal, or all for one token."""
        window = self.config.sliding_window
        num_tokens = position.shape[-1]
        if layout is None and (cache is None or cache.dense):
            first = 0 if cache is None else cache.dropped
            num_slots = num_tokens if cache is None else cache.length
            plain = num_slots == num_tokens or num_tokens == 1
            if plain and (window is None or num_slots <= window):
                return None
            slot = torch.arange(first, first + num_slots, device=position.device)
            return _causal(position, slot, window)
        batch_positions = position.expand(-1 if position.dim() == 2 else 1, -1)
        if cache is None:
            slot, slot_run = batch_positions, None if layout is None else layout.run
        else:
            slot, slot_run = cache.position[:, : cache.length], None
        seen = _causal(batch_positions, slot, window) & (slot >= 0).unsqueeze(1)
        if layout is None:
            return seen.unsqueeze(1)
        old = slot.shape[1] - num_tokens
        if slot_run is None:
            slot_run = torch.cat([layout.run.new_zeros(layout.run.shape[0], old), layout.run], dim=1)
        seen = seen & (slot_run.unsqueeze(1) == layout.run.unsqueeze(2))
        # A padding token sees itself alone: its output is thrown away, and no row of the softmax is empty.
        itself = torch.eye(num_tokens, dtype=torch.bool, device=seen.device)
        alone = F.pad(itself, (old, 0)) & ~layout.real.unsqueeze(2)
        return ((seen & layout.real.unsqueeze(2)) | alone).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        grouped = self.num_heads != self.num_kv_heads
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and query.shape[1] > 1,
            enable_gqa=grouped,
        ).transpose(1, 2)

    def _output(self, mixed: Tensor, layout: TokenLayout | None) -> Tensor:
        mixed = mixed.flatten(2)
        if layout is not None:
            mixed = mixed * layout.real.unsqueeze(-1)
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


def _causal(position: Tensor, slot: Tensor, window: int | None) -> Tensor:
    """Slots [.. s] at or before each position [.. t] and inside the window: [.. t s] bool."""
    distance = position.unsqueeze(-1) - slot.unsqueeze(-2)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
