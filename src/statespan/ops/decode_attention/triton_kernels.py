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


@triton.jit
def slots_in_use(length, capacity, row, window, SLOTS: tl.constexpr, PAGE: tl.constexpr):
    """The first slot to look at and the end. In pages a row has a length of its own, and its window is its end."""
    first = 0
    if PAGE:
        end = tl.minimum(tl.load(length + row).to(tl.int32), capacity)
        if window is not None:
            first = tl.maximum(end - window, 0) // SLOTS * SLOTS
    else:
        end = capacity if length is None else tl.minimum(tl.load(length).to(tl.int32), capacity)
    return first, end


@triton.jit(do_not_specialize=["capacity", "position_stride", "table_stride", "splits"])
def attend(
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
    table_stride,
    splits,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The GROUP heads of one kv head over one split of the slots.

    With one split the mean goes to out [b h p]; with more, sums get the splits' unfinished means
    [b h splits p] and, behind them, the logarithms of their weights [b h splits].
    PAGE: slots of a page, and the first strides are from page to page; 0: each row lies in one piece, and position
    says what is seen.
    """
    kv_head, split, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, in_use = slots_in_use(length, capacity, batch, window, SLOTS, PAGE)
    each = split_size(in_use - first, splits, SLOTS)
    begin = first + split * each
    end = tl.minimum(begin + each, in_use)
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
    k_tile = key + kv_head.to(tl.int64) * key_head_stride + dim[:, None]
    v_tile = value + kv_head.to(tl.int64) * value_head_stride + dim[None]
    newest = 0 if next_position is None else tl.load(next_position + batch)
    # In base 2: the hardware's exponential is one, and the factor goes into the scale.
    scale *= 1.4426950408889634
    most = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([HEADS, DIMS], tl.float32)
    for start in tl.range(begin, end, SLOTS, num_stages=STAGES):
        place = start + slot
        inside = place < end
        if PAGE:
            if window is not None:  # what lies behind it may be NaN, and times 0 that is NaN
                inside = inside & (place >= in_use - window)
            if PAGE % SLOTS == 0:  # one number, which the pipeline of k and v need not wait for
                page = tl.load(table + batch * table_stride + start // PAGE).to(tl.int64) + tl.zeros([SLOTS], tl.int64)
            else:
                page = tl.load(table + batch * table_stride + place // PAGE, inside, 0).to(tl.int64)
            k_at = k_tile + (page * key_stride + place % PAGE * key_slot_stride)[None]
            v_at = v_tile + (page * value_stride + place % PAGE * value_slot_stride)[:, None]
        else:
            k_at = k_tile + (batch * key_stride + place.to(tl.int64) * key_slot_stride)[None]
            v_at = v_tile + (batch * value_stride + place.to(tl.int64) * value_slot_stride)[:, None]
        k = tl.load(k_at, inside[None] & (dim < head_dim)[:, None], 0.0)
        v = tl.load(v_at, inside[:, None] & (dim < head_dim)[None], 0.0)
        if PAGE:
            seen = inside
        else:
            token = tl.load(position + batch * position_stride + place, inside, -1)
            seen = token >= 0
            if next_position is not None:
                seen = seen & (token <= newest)
                if window is not None:
                    seen = seen & (token > newest - window)
        score = tl.dot(q, k, input_precision="ieee") * scale
        score = tl.where(seen[None], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - base[:, None])
        fade = tl.exp2(most - base)
        weight = weight * fade + tl.sum(share, 1)
        mean = tl.dot(share.to(v.dtype), v, mean * fade[:, None], input_precision="ieee")
        most = higher
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


@triton.jit(do_not_specialize=["capacity", "heads", "rows", "splits"])
def combine(
    sums,
    length,
    out,
    capacity,
    head_dim,
    window,
    heads,
    rows,
    splits,
    DIMS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The splits' means of one row and head, weighted: out [b h p]. Splits beyond the length were never written."""
    row = tl.program_id(0).to(tl.int64)
    first, end = slots_in_use(length, capacity, row // heads, window, SLOTS, PAGE)
    part = tl.arange(0, PARTS)
    written = (part < splits) & (first + part * split_size(end - first, splits, SLOTS) < end)
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


@triton.jit
def append(
    qkv,
    cos,
    sin,
    slot,
    query,
    key,
    value,
    head_dim,
    qkv_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIMS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One head of one row's q, k and v: rotated in its first 2 HALF dimensions, but v, and put in its place."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIMS)
    inside = dim < head_dim
    at = qkv + row * qkv_stride + head * head_dim
    x = tl.load(at + dim, inside, 0.0).to(tl.float32)
    if HALF > 0 and head < HEADS + KV_HEADS:
        turned = dim < 2 * HALF
        if INTERLEAVED:
            pair, second = dim // 2, dim % 2
            other = dim + 1 - 2 * second
        else:
            pair, second = dim % HALF, dim // HALF
            other = (dim + HALF) % (2 * HALF)
        partner = tl.load(at + other, turned & inside, 0.0).to(tl.float32)
        c = tl.load(cos + row * HALF + pair, turned, 1.0)
        s = tl.load(sin + row * HALF + pair, turned, 0.0)
        x = x * c + tl.where(second == 0, -partner, partner) * s
    if head < HEADS:
        tl.store(query + (row * HEADS + head) * head_dim + dim, x, inside)
    else:
        place = tl.load(slot + row)
        if head < HEADS + KV_HEADS:
            tl.store(key + place * key_slot_stride + (head - HEADS) * key_head_stride + dim, x, inside)
        else:
            v_head = head - HEADS - KV_HEADS
            tl.store(value + place * value_slot_stride + v_head * value_head_stride + dim, x, inside)
