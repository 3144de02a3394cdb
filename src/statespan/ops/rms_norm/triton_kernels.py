# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RUF005  # its language has no starred tuples
"""RMS normalisation in Triton: a program has tiles of rows, each with all its channels, in registers."""

import triton
import triton.language as tl

from statespan.ops.triton_kernels.functions import sigmoid, silu_slope


@triton.jit
def _divisor(scale):
    """The weight, and in place of 0 what `in_block.TINY` is."""
    return tl.where(scale == 0.0, 1e-30, scale)


@triton.jit
def forward(
    x,
    residual,
    weight,
    y,
    total,
    inverses,
    num_rows,
    channels,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = normalise(x) * weight; with a residual, x + residual is kept in `total` and normalised in place of x.

    Where `inverses` is given, it gets each row's 1 / rms, and x / rms comes back from y even where the weight is 0.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None]
    mask = (row < num_rows) & (column < channels)
    value = tl.load(x + row * x_stride + column, mask, 0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask, 0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row * channels + column, kept, mask)
        value = kept.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / channels + eps)
    scale = tl.load(weight + column, column < channels, 0.0).to(tl.float32)
    if inverses is not None:
        tl.store(inverses + row, inverse, row < num_rows)
        scale = _divisor(scale)
    tl.store(y + row * channels + column, (value * inverse * scale).to(y.dtype.element_ty), mask)


@triton.jit
def _load_chunks(start, size, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A row's values as a tuple of chunks, in the dtype that they have in memory."""
    found = ()
    for i in tl.static_range(CHUNKS):
        column = i * CHUNK + tl.arange(0, CHUNK)
        found = found + (tl.load(start + column, column < size, 0.0),)
    return found


@triton.jit
def _store_chunks(start, chunks, size, CHUNK: tl.constexpr):
    for i in tl.static_range(len(chunks)):
        column = i * CHUNK + tl.arange(0, CHUNK)
        tl.store(start + column, chunks[i].to(start.dtype.element_ty), column < size)


@triton.jit
def _zeros(CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    found = ()
    for _ in tl.static_range(CHUNKS):
        found = found + (tl.zeros([CHUNK], tl.float32),)
    return found


@triton.jit
def _shares(scales, inverses):
    """What the backward multiplies its rows by: 1, or where they are the forward's output, 1 / weight."""
    found = ()
    for i in tl.static_range(len(scales)):
        scale = scales[i].to(tl.float32)
        found = found + (scale * 0.0 + 1.0 if inverses is None else 1.0 / _divisor(scale),)
    return found


@triton.jit
def backward(
    grad_y,
    grad_total,
    x,
    inverses,
    weight,
    grad_x,
    rounded,
    y,
    grad_weight,
    num_rows,
    channels,
    rows_per_program,
    grad_y_stride,
    grad_total_stride,
    x_stride,
    eps,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_x, to which grad_total is added, and each program's part of grad_weight, in float32.

    Where they are given, `rounded` is grad_x once more in its own dtype, and y what the forward gave. With the
    `inverses` that the forward gave, x is its output.
    """
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    count = tl.minimum(rows_per_program, num_rows - first)
    scales = _load_chunks(weight, channels, CHUNK, CHUNKS)
    shares = _shares(scales, inverses)
    sums = _zeros(CHUNK, CHUNKS)
    for done in tl.range(0, count, num_stages=STAGES):
        row = first + done
        values = _load_chunks(x + row * x_stride, channels, CHUNK, CHUNKS)
        grads = _load_chunks(grad_y + row * grad_y_stride, channels, CHUNK, CHUNKS)
        square = tl.zeros([CHUNK], tl.float32)
        along = tl.zeros([CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            value = values[i].to(tl.float32) * shares[i]
            square += value * value
            along += value * grads[i].to(tl.float32) * scales[i].to(tl.float32)
        if inverses is None:
            inverse = tl.rsqrt(tl.sum(square, 0) / channels + eps)
            unit = inverse
        else:
            inverse = tl.load(inverses + row)
            unit = 1.0
        pull = tl.sum(along, 0) * unit / channels
        found = ()
        sums_after = ()
        for i in tl.static_range(CHUNKS):
            normal, grad = values[i].to(tl.float32) * shares[i] * unit, grads[i].to(tl.float32)
            sums_after = sums_after + (sums[i] + grad * normal,)
            found = found + ((grad * scales[i].to(tl.float32) - normal * pull) * inverse,)
        sums = sums_after
        if grad_total is not None:
            totals = _load_chunks(grad_total + row * grad_total_stride, channels, CHUNK, CHUNKS)
            added = ()
            for i in tl.static_range(CHUNKS):
                added = added + (found[i] + totals[i].to(tl.float32),)
            found = added
        _store_chunks(grad_x + row * channels, found, channels, CHUNK)
        if rounded is not None:
            _store_chunks(rounded + row * channels, found, channels, CHUNK)
        if y is not None:
            normal = ()
            for i in tl.static_range(CHUNKS):
                normal = normal + (values[i].to(tl.float32) * unit * scales[i].to(tl.float32),)
            _store_chunks(y + row * channels, normal, channels, CHUNK)
    _store_chunks(grad_weight + tl.program_id(0).to(tl.int64) * channels, sums, channels, CHUNK)


@triton.jit
def gated_forward(
    x,
    z,
    weight,
    y,
    num_rows,
    num_groups,
    group_size,
    x_stride,
    z_stride,
    eps,
    NORM_BEFORE_GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = normalise(x * silu(z)) * weight, or normalise(x) * weight * silu(z); a row is a group of channels."""
    part = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    row, group = part // num_groups, part % num_groups
    column = tl.arange(0, BLOCK)[None]
    mask = (row < num_rows) & (column < group_size)
    channel = group * group_size + column
    value = tl.load(x + row * x_stride + channel, mask, 0.0).to(tl.float32)
    gate = tl.load(z + row * z_stride + channel, mask, 0.0).to(tl.float32)
    gate *= sigmoid(gate)
    if not NORM_BEFORE_GATE:
        value *= gate
    value *= tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / group_size + eps)
    value *= tl.load(weight + channel, mask, 0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        value *= gate
    tl.store(y + row * (num_groups * group_size) + channel, value.to(y.dtype.element_ty), mask)


@triton.jit
def gated_backward(
    grad_y,
    x,
    z,
    weight,
    grad_x,
    grad_z,
    y,
    grad_weight,
    num_rows,
    num_groups,
    group_size,
    rows_per_program,
    grad_y_stride,
    x_stride,
    z_stride,
    grad_z_stride,
    eps,
    NORM_BEFORE_GATE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of x and z, and each program's part of weight's; a program has one group of some rows.

    Where y is given, it becomes what the forward gave.
    With h what is normalised, scale the weight and gate silu(z): y = h inverse scale, h = x gate; or, where the norm is
    before the gate, y = h inverse scale gate, h = x.
    """
    program, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    first = program.to(tl.int64) * rows_per_program
    count = tl.minimum(rows_per_program, num_rows - first)
    channels = num_groups * group_size
    x += group * group_size
    z += group * group_size
    grad_y += group * group_size
    scales = _load_chunks(weight + group * group_size, group_size, CHUNK, CHUNKS)
    sums = _zeros(CHUNK, CHUNKS)
    for done in tl.range(0, count, num_stages=STAGES):
        row = first + done
        values = _load_chunks(x + row * x_stride, group_size, CHUNK, CHUNKS)
        gates = _load_chunks(z + row * z_stride, group_size, CHUNK, CHUNKS)
        grads = _load_chunks(grad_y + row * grad_y_stride, group_size, CHUNK, CHUNKS)
        square = tl.zeros([CHUNK], tl.float32)
        along = tl.zeros([CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            before = gates[i].to(tl.float32)
            value, gate = values[i].to(tl.float32), before * sigmoid(before)
            normal = value if NORM_BEFORE_GATE else value * gate
            square += normal * normal
            along += grads[i].to(tl.float32) * scales[i].to(tl.float32) * value * gate
        inverse = tl.rsqrt(tl.sum(square, 0) / group_size + eps)
        pull = tl.sum(along, 0) * inverse * inverse / group_size
        found = ()
        found_z = ()
        normals = ()
        sums_after = ()
        for i in tl.static_range(CHUNKS):
            before, value, grad = gates[i].to(tl.float32), values[i].to(tl.float32), grads[i].to(tl.float32)
            opening = sigmoid(before)
            gate, slope = before * opening, silu_slope(before, opening)
            sums_after = sums_after + (sums[i] + grad * value * gate * inverse,)
            normals = normals + (value * gate * inverse * scales[i].to(tl.float32),)
            grad *= scales[i].to(tl.float32)
            if NORM_BEFORE_GATE:
                found = found + ((grad * gate - value * pull) * inverse,)
                found_z = found_z + (grad * value * inverse * slope,)
            else:
                grad_normal = (grad - value * gate * pull) * inverse
                found = found + (grad_normal * gate,)
                found_z = found_z + (grad_normal * value * slope,)
        sums = sums_after
        _store_chunks(grad_x + row * channels + group * group_size, found, group_size, CHUNK)
        _store_chunks(grad_z + row * grad_z_stride + group * group_size, found_z, group_size, CHUNK)
        if y is not None:
            _store_chunks(y + row * channels + group * group_size, normals, group_size, CHUNK)
    _store_chunks(grad_weight + program.to(tl.int64) * channels + group * group_size, sums, group_size, CHUNK)
