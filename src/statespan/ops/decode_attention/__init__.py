"""Attention of one new token over a cache of keys and values: the other half of what a hybrid's token costs."""

import math
from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_shape, needs_gradients, refuse_gradients
from statespan.ops.custom_op import define
from statespan.ops.decode_attention import reference, torch_backend
from statespan.ops.dispatch import resolve

__all__ = ["decode_attention"]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    length: Tensor | None = None,
    next_position: Tensor | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of one token a row: y_h = sum_s softmax_s(scale q_h . k_s) v_s   (arXiv 1706.03762, eq. 1).

    Heads h share the keys and values of kv head h // (heads / kv heads) (arXiv 2305.13245).

    Args:
        query: [b h p], float.
        key, value: [b s g p], in query.dtype. g divides h. Slots in use must be finite, also those that are not seen.
        position: [b s], int32. Place of each slot's token in its sequence; -1: the row does not see the slot.
        length: [] or [1], int32, on the device: how many slots are in use, those behind are never read. None: all.
        next_position: [b], int32. Place of the query's token: the row sees no slot beyond it. None: all are before.
        sliding_window: the row sees only slots with next_position - position < sliding_window.
        scale: factor of the scores; None for 1 / sqrt(p).
        backend: "auto", or a name from `statespan backends`. "triton" can be captured in a CUDA graph: its grid
            depends on the capacity s, its reads on the length.

    Returns:
        y [b h p] in query.dtype; 0 for a row that sees no slot. Gradients come from "torch".

    Raises:
        UserError: shapes, dtypes or devices disagree (both in the message), or a window has no next_position.
        BackendUnavailable: the named backend cannot run here, with the reason.

    Numerics: scores, softmax and sums in float32; the weights meet bfloat16 and float16 values in their dtype.
    Deterministic.

    Example:
        >>> query, cache, position = torch.randn(1, 4, 16), torch.randn(1, 9, 2, 16), torch.arange(9, dtype=torch.int32)
        >>> decode_attention(query, cache, cache, position[None]).shape
        torch.Size([1, 4, 16])
    """
    op = "decode_attention"
    check_dim(op, "query", query, "[b h p]")
    check_dim(op, "key", key, "[b s g p]")
    batch, heads, head_dim = query.shape
    slots, kv_heads = key.shape[1:3]
    check_shape(op, "key", key, "[b s g p]", (batch, slots, kv_heads, head_dim))
    check_shape(op, "value", value, "[b s g p]", (batch, slots, kv_heads, head_dim))
    check_shape(op, "position", position, "[b s]", (batch, slots))
    check_shape(op, "next_position", next_position, "[b]", (batch,))
    if length is not None and length.numel() != 1:
        raise UserError(f"{op}: length must be one number, [] or [1], got {list(length.shape)}")
    check_devices(op, query=query, key=key, value=value, position=position, length=length, next_position=next_position)
    if kv_heads == 0 or heads % kv_heads:
        raise UserError(f"{op}: the {kv_heads} kv heads must divide h = {heads}")
    if sliding_window is not None and next_position is None:
        raise UserError(f"{op}: a sliding_window needs next_position, the place of the query's token")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise UserError(f"{op}: query is {query.dtype} and {name} {tensor.dtype}; they must agree")
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    tensors = (query, key, value, position, length, next_position)
    if needs_gradients(query, key, value):
        if backend != "torch":
            refuse_gradients(op, backend)
        module = reference if backend == "reference" else torch_backend
        return module.decode_attention(*tensors, sliding_window, factor)
    return _decode_attention(*tensors, sliding_window, factor, backend)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    length: Tensor | None,
    next_position: Tensor | None,
    sliding_window: int | None,
    scale: float,
    backend: str,
) -> Tensor:
    arguments = (query, key, value, position, length, next_position, sliding_window, scale)
    with torch.autocast(query.device.type, enabled=False):
        match resolve("decode_attention", backend, query.device, query.dtype):
            case "triton":
                from statespan.ops.decode_attention import triton_backend  # imports Triton, so imported when it runs

                return triton_backend.decode_attention(*arguments)
            case "torch":
                return torch_backend.decode_attention(*arguments)
            case _:
                return reference.decode_attention(*arguments)


def _fake(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


_decode_attention = define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor position, Tensor? length, Tensor? next_position,"
    " int? sliding_window, float scale, str backend) -> Tensor",
    _kernel,
    _fake,
)
