"""Attention of one token on GPUs: tensors to the kernels of `triton_kernels.py`. The host never learns the length."""

import torch
from torch import Tensor

from statespan.ops.decode_attention import triton_kernels as kernels
from statespan.ops.gpu import multiprocessors, shared_memory
from statespan.ops.layout import contiguous, last_contiguous
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import start

SLOTS = 64  # slots that are read together
STAGES = 4
PROGRAMS = 1  # of a multiprocessor
MOST_SPLITS = 128


def _step(slot_bytes: int, device: torch.device) -> tuple[int, int]:
    """Slots of a step and steps on their way, of keys and values with so many bytes each."""
    room = shared_memory(device) // PROGRAMS
    stages = STAGES if room > 64 << 10 else 3  # Triton 3.6 does not compile 4 for AMD, where there is 64 KiB
    slots = SLOTS
    while stages * 2 * slots * slot_bytes > room and slots > 16:
        slots //= 2
    return slots, stages


def _splits(batch: int, kv_heads: int, capacity: int, slots: int, device: torch.device) -> int:
    """Parts of the slots that fill the machine once; the grid does not depend on the length."""
    fill = PROGRAMS * multiprocessors(device) // (batch * kv_heads)
    return max(1, min(fill, -(-capacity // slots), MOST_SPLITS))


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
    """[b h p] of `statespan.ops.decode_attention`."""
    position, next_position = last_contiguous(position), contiguous(next_position)
    seen = (position, None, length, next_position)
    return _run(query, key, value, seen, key.shape[1], sliding_window, scale)


def paged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    sliding_window: int | None,
    scale: float,
) -> Tensor:
    """[b h p] of `statespan.ops.paged_decode_attention`."""
    seen = (None, last_contiguous(table), length.contiguous(), None)
    page_size = key.shape[1]
    return _run(query, key, value, seen, table.shape[1] * page_size, sliding_window, scale, page_size)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    capacity: int,
    sliding_window: int | None,
    scale: float,
    page_size: int = 0,
) -> Tensor:
    """Launch; seen: position, table, length and next_position."""
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    out = query.new_empty(query.shape)
    if out.numel() == 0 or capacity == 0:
        return out.zero_()
    query, key, value = (last_contiguous(tensor) for tensor in (query, key, value))
    position, table, length, next_position = seen
    dims = max(16, power_of_two(head_dim))
    slots, stages = _step(dims * key.element_size(), query.device)
    splits = _splits(batch, kv_heads, capacity, slots, query.device)
    sums = None
    if splits > 1:
        sums = torch.empty(batch * heads * splits * (head_dim + 1), dtype=torch.float32, device=query.device)
    with on(query.device):
        start(
            kernels.attend,
            (kv_heads, splits, batch),
            query,
            key,
            value,
            position,
            table,
            length,
            next_position,
            out,
            sums,
            capacity,
            heads,
            head_dim,
            sliding_window,
            scale,
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            0 if position is None else position.stride(0),
            0 if table is None else table.stride(0),
            splits,
            GROUP=heads // kv_heads,
            HEADS=max(16, power_of_two(heads // kv_heads)),
            DIMS=dims,
            SLOTS=slots,
            STAGES=2 * stages - 1 if page_size and stages == STAGES else stages,  # the table is read before
            PAGE=page_size,
            num_warps=4,
        )
        if sums is not None:
            start(
                kernels.combine,
                (batch * heads,),
                sums,
                length,
                out,
                capacity,
                head_dim,
                sliding_window,
                heads,
                batch * heads,
                splits,
                DIMS=dims,
                SLOTS=slots,
                PARTS=power_of_two(splits),
                PAGE=page_size,
                num_warps=4,
            )
    return out


def append_token(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
) -> Tensor:
    """[b h p] of `statespan.ops.decode_attention.paged.append_token`, qkv as [b h+2g p]."""
    batch, all_heads, head_dim = qkv.shape
    kv_heads = key.shape[2]
    heads = all_heads - 2 * kv_heads
    qkv = qkv.contiguous()
    query = torch.empty(batch, heads, head_dim, dtype=key.dtype, device=qkv.device)
    cos, sin = (None, None) if angles is None else (angle.contiguous() for angle in angles)
    with on(qkv.device):
        start(
            kernels.append,
            (batch, all_heads),
            qkv,
            cos,
            sin,
            slot,
            query,
            key,
            value,
            head_dim,
            qkv.stride(0),
            *key.stride()[1:3],
            *value.stride()[1:3],
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIMS=power_of_two(head_dim),
            HALF=0 if cos is None else cos.shape[-1],
            INTERLEAVED=interleaved,
            num_warps=1 if head_dim <= 128 else 4,
        )
    return query
