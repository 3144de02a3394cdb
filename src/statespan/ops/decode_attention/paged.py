"""decode_attention over keys and values that lie in pages, as the serving engine keeps them."""

import math
from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_shape
from statespan.ops.custom_op import define
from statespan.ops.decode_attention import reference, torch_backend
from statespan.ops.dispatch import resolve
from statespan.ops.rotary import rotate


def paged_decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token a row over pages: the row's slot s is key[table[row, s // page_size], s % page_size].

    Heads h share the keys and values of kv head h // (heads / kv heads) (arXiv 2305.13245); pages as in PagedAttention
    (arXiv 2309.06180).

    Args:
        query: [b h p], float.
        key, value: [n page_size g p], in query.dtype. g divides h.
        table: [b m], int32 in [0, n). Only entries of pages in use are looked at.
        length: [b], int32, at most m page_size: slots of each row that are in use, its own newest included.
        sliding_window: the row sees only its newest so many slots.
        scale: factor of the scores; None for 1 / sqrt(p).
        backend: "auto", or a name from `statespan backends`. "triton" can be captured in a CUDA graph.

    Returns:
        y [b h p] in query.dtype; 0 for a row of length 0. Slots that a row does not see may hold anything. Without
        gradients.

    Raises:
        UserError: shapes, dtypes or devices disagree (both in the message).
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: as `decode_attention`. Deterministic.

    Example:
        >>> query, pages = torch.randn(1, 4, 16), torch.randn(9, 8, 2, 16)
        >>> table, length = torch.tensor([[3, 7]], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
        >>> paged_decode_attention(query, pages, pages, table, length).shape
        torch.Size([1, 4, 16])
    """
    op = "paged_decode_attention"
    check_dim(op, "query", query, "[b h p]")
    check_dim(op, "key", key, "[n page_size g p]")
    check_dim(op, "table", table, "[b m]")
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    check_shape(op, "key", key, "[n page_size g p]", (*key.shape[:3], head_dim))
    check_shape(op, "value", value, "[n page_size g p]", tuple(key.shape))
    check_shape(op, "table", table, "[b m]", (batch, table.shape[1]))
    check_shape(op, "length", length, "[b]", (batch,))
    check_devices(op, query=query, key=key, value=value, table=table, length=length)
    if kv_heads == 0 or heads % kv_heads:
        raise UserError(f"{op}: the {kv_heads} kv heads must divide h = {heads}")
    if sliding_window is not None and sliding_window < 1:
        raise UserError(f"{op}: a sliding_window holds the newest slot at least, got {sliding_window}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise UserError(f"{op}: query is {query.dtype} and {name} {tensor.dtype}; they must agree")
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    return _paged(query, key, value, table, length, sliding_window, factor, backend)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    length: Tensor,
    sliding_window: int | None,
    scale: float,
    backend: str,
) -> Tensor:
    arguments = (query, key, value, table, length, sliding_window, scale)
    with torch.autocast(query.device.type, enabled=False):
        match resolve("decode_attention", backend, query.device, query.dtype):
            case "triton":
                from statespan.ops.decode_attention import triton_backend  # imports Triton, so imported when it runs

                return triton_backend.paged_decode_attention(*arguments)
            case "torch":
                return torch_backend.paged_decode_attention(*arguments)
            case _:
                return reference.paged_decode_attention(*arguments)


def _fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


_paged = define(
    "paged_decode_attention(Tensor query, Tensor key, Tensor value, Tensor table, Tensor length, int? sliding_window,"
    " float scale, str backend) -> Tensor",
    _kernel,
    _fake,
)


def append_token(
    qkv: Tensor,
    key: Tensor,
    value: Tensor,
    slot: Tensor,
    angles: tuple[Tensor, Tensor] | None = None,
    *,
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Rotate the queries and keys of one token a row, and write its key and value into the pages.

    Args:
        qkv: [b (h + 2 g) p], float: the heads of q, then those of k, then those of v.
        key, value: [n page_size g p], float, without gaps. Overwritten at the slots.
        slot: [b], int64, over all pages one after the other.
        angles: cos and sin [b r/2] of each row's rotary embedding of the first r of p dimensions
            (arXiv 2104.09864), float32.
        interleaved: neighbours are rotated together, in place of halves.
        backend: "auto", or a name from `statespan backends`. "triton" can be captured in a CUDA graph.

    Returns:
        The queries [b h p] in key.dtype.
    """
    kv_heads, head_dim = key.shape[2:]
    qkv = qkv.view(len(qkv), -1, head_dim)
    if resolve("decode_attention", backend, qkv.device, key.dtype) == "triton":
        from statespan.ops.decode_attention import triton_backend  # imports Triton, so imported when it runs

        return triton_backend.append_token(qkv, key, value, slot, angles, interleaved)
    query, new_key, new_value = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if angles is not None:
        cos, sin = (angle.unsqueeze(1) for angle in angles)
        query, new_key = (rotate(x, cos, sin, interleaved=interleaved) for x in (query, new_key))
    for pages, new in ((key, new_key), (value, new_value)):
        pages.flatten(0, 1).index_copy_(0, slot, new.to(pages.dtype))
    return query.to(key.dtype)
