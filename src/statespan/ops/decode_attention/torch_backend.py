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
    return _attend(query, key, value, seen, scale)


def paged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    sliding_window: int | None,
    scale: float,
) -> Tensor:
    """[b h p] of `statespan.ops.paged_decode_attention`, over copies; on a GPU it waits for the lengths."""
    lengths: list[int] = length.tolist()
    if not any(lengths):
        return torch.zeros_like(query)
    page_size = key.shape[1]
    first = min(used - min(used, sliding_window or used) for used in lengths) // page_size
    pages = table[:, first : -(-max(lengths) // page_size)]
    slot = torch.arange(pages.shape[1] * page_size, device=key.device) + first * page_size
    seen = slot < length[:, None]
    if sliding_window is not None:
        seen &= slot >= length[:, None] - sliding_window
    # Pages hold what other rows left; a NaN there must not even be multiplied by zero.
    key, value = (x[pages].flatten(1, 2).masked_fill_(~seen[:, :, None, None], 0) for x in (key, value))
    return _attend(query, key, value, seen, scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[b h p]: each row over the slots that it has `seen` [b s]; 0 where there is none."""
    y = F.scaled_dot_product_attention(
        query[:, :, None],
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=seen[:, None, None],
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[2],
    )
    return torch.where(seen.any(1)[:, None, None], y[:, :, 0], 0.0)  # SDPA has no answer where nothing is seen
