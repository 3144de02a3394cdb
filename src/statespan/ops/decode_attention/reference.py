"""Attention of one token over a cache, with the softmax written out: the truth the other backends are held to."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    length: Tensor | None,
    next_position: Tensor | None,
    sliding_window: int | None,
    scale: float,
) -> Tensor:
    """[b h p] of `statespan.ops.decode_attention`, row by row and head by head."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    used = key.shape[1] if length is None else min(int(length), key.shape[1])
    heads_each = query.shape[1] // key.shape[2] if key.shape[2] else 1
    out = query.new_zeros(query.shape, dtype=dtype)
    for b in range(query.shape[0]):
        seen = position[b, :used] >= 0
        if next_position is not None:
            seen &= position[b, :used] <= next_position[b]
            if sliding_window is not None:
                seen &= position[b, :used] > next_position[b] - sliding_window
        for h in range(query.shape[1] if seen.any() else 0):
            keys, values = (cache[b, :used, h // heads_each][seen].to(dtype) for cache in (key, value))
            out[b, h] = (keys @ query[b, h].to(dtype) * scale).softmax(0) @ values
    return out.to(query.dtype)


def paged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    sliding_window: int | None,
    scale: float,
) -> Tensor:
    """[b h p] of `statespan.ops.paged_decode_attention`: each row's slots in order, then as above."""
    out = query.new_zeros(query.shape)
    for b, used in enumerate(length.tolist()):
        slot = torch.arange(used - min(used, sliding_window or used), used, device=key.device)
        page = table[b].long()[slot // key.shape[1]]
        keys, values = (cache[page, slot % key.shape[1]][None] for cache in (key, value))
        position = torch.zeros(1, len(slot), dtype=torch.int32, device=key.device)
        out[b] = decode_attention(query[b : b + 1], keys, values, position, None, None, None, scale)[0]
    return out
