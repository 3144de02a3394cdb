"""Attention of many tokens by PyTorch's fused kernels, never with a score or a mask for all pairs of tokens at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_ELEMENTS = 1 << 24  # of the mask of one block of queries
HALF = (torch.bfloat16, torch.float16)
PART, GRAIN = 8192, 1024  # slots behind a chunk and tokens of it that come in multiples of this


def causal_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """Attention to a dense past: the last of t tokens stands at the last of s slots.

    Args:
        query: [b t h p], float.
        key, value: [b s g p], s >= t. g divides h.
        window: a token sees this many slots, its own included. None: all before it.

    Returns:
        [b t h p].
    """
    num_tokens, num_slots = query.shape[1], key.shape[1]
    if window is not None and num_slots <= window:
        window = None  # nothing is behind it
    if num_tokens == 1:
        first = 0 if window is None else num_slots - window
        return _attend(query, key[:, first:], value[:, first:])
    if window is None and num_tokens == num_slots:
        return _attend(query, key, value, causal=True)
    if window is None and query.is_cuda and not query.requires_grad:
        # Autocast does not see calls with this kind of mask, and a cache has the weights' dtype.
        key, value = key.to(query.dtype), value.to(query.dtype)
        if _in_parts(query, num_slots - num_tokens):
            return _joined_parts(query, key, value)
        from torch.nn.attention.bias import causal_lower_right  # brings in the compiler, so imported when it runs

        return _attend(query, key, value, mask=causal_lower_right(num_tokens, num_slots))
    old = num_slots - num_tokens

    def block(begin: int, end: int) -> Tensor:
        first = 0 if window is None else max(0, old + begin - window + 1)
        slot = torch.arange(first, old + end, device=query.device)
        mask = sees(slot[slot.shape[0] - (end - begin) :], slot, window)
        slots = slice(first, old + end)
        return _attend(query[:, begin:end], key[:, slots], value[:, slots], mask=mask)

    return _in_blocks(block, num_tokens, min(num_slots, window or num_slots))


def _in_parts(query: Tensor, behind: int) -> bool:
    """Whether a chunk behind so many slots is faster in parts."""
    num_tokens, head_dim = query.shape[1], query.shape[3]
    fits = query.dtype in HALF and head_dim in (64, 128) and num_tokens % GRAIN == 0 and behind >= PART
    return fits and torch.cuda.get_device_capability(query.device)[0] == 9 and torch.backends.cuda.cudnn_sdp_enabled()


def _joined_parts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`causal_attention` on a Hopper, where cuDNN takes 0.6 of the time of the kernel with an edge at the lower right.

    It knows no such edge, so it gets what lies wholly behind the tokens, in pieces of PART, 2 PART, 4 PART .. slots:
    it prepares each shape once. The rest and the tokens themselves take the other kernel. Parts are joined by the
    logarithms of their softmaxes' sums.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    behind = (key.shape[2] - query.shape[2]) // PART * PART
    mixed, sums = _seen_to_edge(query, key[:, :, behind:], value[:, :, behind:])
    mixed, first = mixed.float(), 0
    for size in (PART << bit for bit in range((behind // PART).bit_length()) if behind & PART << bit):
        piece = slice(first, first + size)
        part, part_sums = _seen_whole(query, key[:, :, piece], value[:, :, piece])
        mixed = torch.lerp(mixed, part.float(), torch.sigmoid(part_sums - sums).unsqueeze(3))
        sums, first = torch.logaddexp(sums, part_sums), first + size
    return mixed.to(query.dtype).transpose(1, 2)


def _seen_to_edge(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The last of t tokens [b h t p] stands at the last slot of [b g s p]: [b h t p], and log sums [b h t]."""
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)
    return found[0], found[1]


def _seen_whole(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """As `_seen_to_edge`, and each token sees all slots."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    return found[0], found[1].view(query.shape[:3])


def masked_attention(query: Tensor, key: Tensor, value: Tensor, seen: Callable[[slice], Tensor]) -> Tensor:
    """Attention in which `seen(tokens)` [b t s] bool says which slots these tokens see; each sees one at least.

    Args:
        query: [b t h p], float.
        key, value: [b s g p]. g divides h.
        seen: is asked for a part of the tokens at a time.

    Returns:
        [b t h p].
    """

    def block(begin: int, end: int) -> Tensor:
        return _attend(query[:, begin:end], key, value, mask=seen(slice(begin, end)).unsqueeze(1))

    return _in_blocks(block, query.shape[1], key.shape[0] * key.shape[1])


def sees(position: Tensor, slot: Tensor, window: int | None) -> Tensor:
    """Slots [.. s] at or before each position [.. t] and inside the window: [.. t s] bool."""
    distance = position.unsqueeze(-1) - slot.unsqueeze(-2)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _in_blocks(block: Callable[[int, int], Tensor], num_tokens: int, mask_row: int) -> Tensor:
    size = max(16, MASK_ELEMENTS // mask_row)
    blocks = [block(begin, min(begin + size, num_tokens)) for begin in range(0, num_tokens, size)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    heads, kv_heads = query.shape[2], key.shape[2]
    flash = mask is None or type(mask) is not Tensor
    if heads != kv_heads and query.is_cuda and not (flash and query.dtype in HALF):
        # The kernels that take masks or float32 want as many kv heads; what would run instead holds all scores.
        key, value = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (key, value))
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=heads != key.shape[2],
    ).transpose(1, 2)
