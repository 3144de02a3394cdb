"""Attention of one token by PyTorch's scaled_dot_product_attention, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """[b h p] of `statespan.ops.decode_attention`; on a GPU it waits to learn the length."""
    used = key.shape[1] if length is None else min(int(length), key.shape[1])
    key, value, position = key[:, :used], value[:, :used], position[:, :used]
    seen = position >= 0
    if next_position is not None:
        seen &= position <= next_position[:, None]
        if sliding_window is not None:
            seen &= position > next_position[:, None] - sliding_window
    y = F.scaled_dot_product_attention(
        query[:, :, None],
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[2],
    )
    return torch.where(seen.any(1)[:, None, None], y[:, :, 0], 0.0)  # SDPA has no answer where nothing is seen
