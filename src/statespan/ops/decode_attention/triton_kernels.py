# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
"""One query a row over a cache: splits of the slots side by side, then their softmax sums put together in order."""

import triton
import triton.language as tl


@triton.jit
def split_size(length, splits, SLOTS: tl.constexpr):
    """Slots of a split, a multiple of SLOTS: all splits share what is in use, whatever the capacity."""
    return tl.cdiv(tl.cdiv(length, splits), SLOTS) * SLOTS


@triton.jit(do_not_specialize=["capacity", "position_stride", "splits"])
def attend(
    query,
    key,
    value,
    position,
    length,
    next_position,
    out,
    sums,
    capacity,
    heads,
    head_dim,
    window,
    scale,
    query_stride,
    query_head_stride,
    key_stride,
    key_slot_stride,
    key_head_stride,
    value_stride,
    value_slot_stride,
    value_head_stride,
    position_stride,
    splits,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The GROUP heads of one kv head over one split of the slots.

    With one split the mean goes to out [b h p]; with more, sums get the splits' unfinished means
    [b h splits p] and, behind them, the logarithms of their weights [b h splits].
    """
    kv_head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_use = capacity if length is None else tl.minimum(tl.load(length).to(tl.int32), capacity)
    each = split_size(in_use, splits, SLOTS)
    begin, end = split * each, tl.minimum((split + 1) * each, in_use)
    if sums is not None:  # noqa: SIM102  # decided when it compiles
        if begin >= end:
            return
    head = tl.arange(0, HEADS)
    dim = tl.arange(0, DIMS)
    here = (head < GROUP)[:, None] & (dim < head_dim)[None]
    head = kv_head * GROUP + tl.where(head < GROUP, head, 0)
    q_at = query + batch * query_stride + head[:, None] * query_head_stride + dim[None]
    q = tl.load(q_at, here, 0.0)
    slot = tl.arange(0, SLOTS)
    first = batch * key_stride + kv_head.to(tl.int64) * key_head_stride
    k_tile = key + first + (begin + slot).to(tl.int64)[None] * key_slot_stride + dim[:, None]
    first = batch * value_stride + kv_head.to(tl.int64) * value_head_stride
    v_tile = value + first + (begin + slot).to(tl.int64)[:, None] * value_slot_stride + dim[None]
    seen_at = position + batch * position_stride + slot
    newest = 0 if next_position is None else tl.load(next_position + batch)
    # In base 2: the hardware's exponential is one, and the factor goes into the scale.
    scale *= 1.4426950408889634
    most = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([HEADS, DIMS], tl.float32)
    for start in tl.range(begin, end, SLOTS, num_stages=STAGES):
        inside = start + slot < end
        k = tl.load(k_tile, inside[None] & (dim < head_dim)[:, None], 0.0)
        v = tl.load(v_tile, inside[:, None] & (dim < head_dim)[None], 0.0)
        place = tl.load(seen_at + start, inside, -1)
        seen = place >= 0
        if next_position is not None:
            seen = seen & (place <= newest)
            if window is not None:
                seen = seen & (place > newest - window)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(seen[None], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - base[:, None])
        fade = tl.exp2(most - base)
        weight = weight * fade + tl.sum(share, 1)
        mean = tl.dot(share.to(v.dtype), v, mean * fade[:, None], input_precision="ieee")
        most = higher
        k_tile += SLOTS * key_slot_stride
        v_tile += SLOTS * value_slot_stride
    weight = tl.where(weight == 0.0, 1.0, weight)  # no slot seen: a mean of 0 whose weight is 2^-inf
    mean = mean / weight[:, None]
    row = batch * heads + head
    if sums is None:
        tl.store(out + (row * head_dim)[:, None] + dim[None], mean, here)
    else:
        part = row * splits + split
        tl.store(sums + (part * head_dim)[:, None] + dim[None], mean, here)
        logarithms = sums + tl.num_programs(2).to(tl.int64) * heads * splits * head_dim
        tl.store(logarithms + part, most + tl.log2(weight), tl.arange(0, HEADS) < GROUP)


@triton.jit(do_not_specialize=["capacity", "rows", "splits"])
def combine(
    sums,
    length,
    out,
    capacity,
    head_dim,
    rows,
    splits,
    DIMS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The splits' means of one row and head, weighted: out [b h p]. Splits beyond the length were never written."""
    row = tl.program_id(0).to(tl.int64)
    in_use = capacity if length is None else tl.minimum(tl.load(length).to(tl.int32), capacity)
    part = tl.arange(0, PARTS)
    written = (part < splits) & (part * split_size(in_use, splits, SLOTS) < in_use)
    dim = tl.arange(0, DIMS)
    part = row * splits + part
    logarithm = tl.load(sums + rows.to(tl.int64) * splits * head_dim + part, written, float("-inf"))
    most = tl.max(logarithm, 0)
    weight = tl.exp2(logarithm - tl.where(most == float("-inf"), 0.0, most))
    mask = written[:, None] & (dim < head_dim)[None]
    mean = tl.load(sums + (part * head_dim)[:, None] + dim[None], mask, 0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(mean * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * head_dim + dim, result, dim < head_dim)
