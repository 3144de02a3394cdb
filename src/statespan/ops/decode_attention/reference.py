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
