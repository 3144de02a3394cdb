"""Less common loads and stores: int8 weights, strided values, addresses, lanes. For kernel modules; imports Numba."""

from typing import Any

from llvmlite import ir
from numba import types

from statespan.ops.numba_kernels.vector import (
    BITS,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    VECTOR,
    WIDTH,
    load_bits,
    load_first_bits,
    narrowed,
    pointer_to,
    splat,
    typed,
    widened,
)


@typed(types.void, types.int64, types.int64, types.int64)
def store_int64(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write one int64 value."""
    builder.store(value, pointer_to(builder, address, index, I64))


@typed(types.void, types.int64, types.int64, types.float32)
def store_scalar_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write one float32 value as bfloat16. (LLVM 22 makes 32 bits of `store_first_bf16` with a constant count of 1.)"""
    halves = narrowed(builder, splat(builder, value))
    builder.store(builder.extract_element(halves, I32(0)), pointer_to(builder, address, index, I16))


@typed(VECTOR, types.int64, types.int64)
def load_int8_as_float(builder: Any, address: Any, index: Any) -> Any:
    """WIDTH int8 values from element `index` on, as float32."""
    return builder.sitofp(load_bits(builder, address, index, I8), FLOATS)


@typed(VECTOR, types.int64, types.int64, types.int64)
def load_first_int8_as_float(builder: Any, address: Any, index: Any, count: Any) -> Any:
    """The first `count` int8 values as float32, zeros in the other lanes; touches no memory behind them."""
    return builder.sitofp(load_first_bits(builder, address, index, count, I8), FLOATS)


def _strided(builder: Any, address: Any, index: Any, stride: Any, count: Any, element: Any) -> Any:
    """The values at index, index + stride, ...; lanes from `count` on repeat the last one."""
    values = ir.Constant(ir.VectorType(element, WIDTH), ir.Undefined)
    last = builder.sub(count, I64(1))
    for lane in range(WIDTH):
        step = builder.select(builder.icmp_signed("<", last, I64(lane)), last, I64(lane))
        at = builder.add(index, builder.mul(step, stride))
        values = builder.insert_element(values, builder.load(pointer_to(builder, address, at, element)), I32(lane))
    return values


@typed(VECTOR, types.int64, types.int64, types.int64, types.int64)
def load_strided(builder: Any, address: Any, index: Any, stride: Any, count: Any) -> Any:
    """`count` float32 values from element `index` on, `stride` elements apart; the other lanes repeat the last one."""
    return builder.bitcast(_strided(builder, address, index, stride, count, I32), FLOATS)


@typed(VECTOR, types.int64, types.int64, types.int64, types.int64)
def load_strided_bf16(builder: Any, address: Any, index: Any, stride: Any, count: Any) -> Any:
    """`load_strided` of bfloat16 values."""
    return widened(builder, _strided(builder, address, index, stride, count, I16))


@typed(types.float32, VECTOR, types.int64)
def get_lane(builder: Any, x: Any, lane: Any) -> Any:
    """The value of one lane."""
    return builder.extract_element(x, builder.trunc(lane, I32))


@typed(VECTOR, VECTOR, types.int64, types.float32)
def set_lane(builder: Any, x: Any, lane: Any, value: Any) -> Any:
    """The vector with one lane replaced."""
    chosen = builder.icmp_signed("==", ir.Constant(BITS, list(range(WIDTH))), splat(builder, builder.trunc(lane, I32)))
    return builder.select(chosen, splat(builder, value), x)
