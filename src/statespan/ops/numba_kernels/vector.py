"""Vectors of float32 as Numba values: loads, stores, arithmetic. For kernel modules; importing it imports Numba.

A vector is one machine register of WIDTH float32 values. It is born by `load`, `broadcast` or `zeros`, is combined with
`+ - * /` and `-v` (a scalar is broadcast; `a * b + c` becomes one fused instruction), `maximum`, `minimum`,
`where_less`, and ends in `store` or `horizontal_sum`. Addresses are int64 (the tensor arguments of a kernel), indices
count elements. The `_any` forms take only the first `count` lanes and read or write bfloat16 where the flag `bf16` is
not 0.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from statespan.ops.numba_kernels.host import has_bf16_rounding, vector_width

WIDTH = vector_width()
F32, I1, I8, I16, I32, I64 = (
    ir.FloatType(),
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
)
FLOATS, BITS, HALVES, MASK = (ir.VectorType(element, WIDTH) for element in (F32, I32, I16, I1))


def jit(function: Any) -> Any:
    """Compile a helper of kernels: always inlined, and an integer division by zero does not raise."""
    options: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # numba's own annotations lack these two
    return njit(error_model="numpy", forceinline=True, **options)(function)


def jit_once(function: Any) -> Any:
    """As `jit`, but compiled once and called: for long helpers that a kernel uses in several places."""
    options: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return njit(error_model="numpy", **options)(function)


class VectorType(types.Type):
    """The Numba type of a vector."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector{WIDTH}")


VECTOR = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, FLOATS)


# What intrinsics are made of. The code generators take an LLVM builder and LLVM values.


def typed(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a Numba intrinsic with fixed types from its code generator `f(builder, *values)`."""

    def decorate(generate: Callable[..., Any]) -> Any:
        def implementation(typingctx: Any, *_: Any) -> Any:
            return result(*arguments), lambda context, builder, signature, values: generate(builder, *values)

        # Numba takes the number of arguments from the signature.
        names = ["typingctx", *list(inspect.signature(generate).parameters)[1:]]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        implementation.__signature__ = inspect.Signature(parameters)
        implementation.__name__, implementation.__doc__ = generate.__name__, generate.__doc__
        return intrinsic(implementation)

    return decorate


def splat(builder: Any, scalar: Any) -> Any:
    """The LLVM vector with `scalar` in every lane."""
    anything = ir.Constant(ir.VectorType(scalar.type, WIDTH), ir.Undefined)
    single = builder.insert_element(anything, scalar, I32(0))
    return builder.shuffle_vector(single, anything, ir.Constant(BITS, [0] * WIDTH))


def constant(element: Any, value: float) -> Any:
    """The LLVM constant with `value` in every lane."""
    return ir.Constant(ir.VectorType(element, WIDTH), [element(value)] * WIDTH)


def call_llvm(builder: Any, name: str, result: Any, *args: Any, **options: Any) -> Any:
    """Call LLVM's own intrinsic `name`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args, **options)


def pointer_to(builder: Any, address: Any, index: Any, element: Any, count: int = 1) -> Any:
    """The pointer to `count` elements that begin at `index` of the array at int64 `address`."""
    first = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    return first if count == 1 else builder.bitcast(first, ir.VectorType(element, count).as_pointer())


def load_bits(builder: Any, address: Any, index: Any, element: Any) -> Any:
    """WIDTH integers of the type `element` from element `index` on."""
    return builder.load(pointer_to(builder, address, index, element, WIDTH), align=element.width // 8)


def _store(builder: Any, address: Any, index: Any, value: Any) -> None:
    element = value.type.element
    builder.store(value, pointer_to(builder, address, index, element, WIDTH), align=element.width // 8)


def _mask(builder: Any, count: Any) -> Any:
    """True in the first `count` lanes."""
    return builder.icmp_signed("<", ir.Constant(BITS, list(range(WIDTH))), splat(builder, builder.trunc(count, I32)))


def load_first_bits(builder: Any, address: Any, index: Any, count: Any, element: Any) -> Any:
    """The first `count` of them, zeros in the other lanes."""
    pointer = pointer_to(builder, address, index, element, WIDTH)
    name, kind = f"llvm.masked.load.v{WIDTH}i{element.width}.p0", ir.VectorType(element, WIDTH)
    alignment = I32(element.width // 8)
    return call_llvm(builder, name, kind, pointer, alignment, _mask(builder, count), ir.Constant(kind, None))


def _store_first(builder: Any, address: Any, index: Any, count: Any, value: Any) -> None:
    element = value.type.element
    pointer = pointer_to(builder, address, index, element, WIDTH)
    name, alignment = f"llvm.masked.store.v{WIDTH}i{element.width}.p0", I32(element.width // 8)
    call_llvm(builder, name, ir.VoidType(), value, pointer, alignment, _mask(builder, count))


def widened(builder: Any, halves: Any) -> Any:
    """bfloat16 to float32: they are the upper half of the bits."""
    many = isinstance(halves.type, ir.VectorType)
    wide = builder.zext(halves, BITS if many else I32)
    return builder.bitcast(builder.shl(wide, constant(I32, 16) if many else I32(16)), FLOATS if many else F32)


class _BFloat(ir.types.Type):
    """LLVM's own bfloat type, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def narrowed(builder: Any, value: Any) -> Any:
    """float32 to bfloat16, to nearest and ties to even; NaN stays NaN. The processor's own takes denormals for 0."""
    if has_bf16_rounding():
        name = f"llvm.x86.avx512bf16.cvtneps2bf16.{32 * WIDTH}"
        return builder.bitcast(call_llvm(builder, name, ir.VectorType(_BFloat(), WIDTH), value), HALVES)
    bits = builder.bitcast(value, BITS)
    upper = builder.lshr(bits, constant(I32, 16))
    odd = builder.and_(upper, constant(I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, odd), constant(I32, 0x7FFF)), constant(I32, 16))
    quiet_nan = builder.or_(upper, constant(I32, 0x40))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet_nan, rounded), HALVES)


# Loads and stores.


@typed(VECTOR, types.int64, types.int64)
def load(builder: Any, address: Any, index: Any) -> Any:
    """WIDTH float32 values from element `index` on."""
    return builder.bitcast(load_bits(builder, address, index, I32), FLOATS)


@typed(VECTOR, types.int64, types.int64)
def load_bf16(builder: Any, address: Any, index: Any) -> Any:
    """WIDTH bfloat16 values from element `index` on."""
    return widened(builder, load_bits(builder, address, index, I16))


@typed(types.void, types.int64, types.int64, VECTOR)
def store(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write WIDTH float32 values from element `index` on."""
    _store(builder, address, index, builder.bitcast(value, BITS))


@typed(types.void, types.int64, types.int64, VECTOR)
def store_bf16(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write WIDTH bfloat16 values from element `index` on, rounded to nearest even."""
    _store(builder, address, index, narrowed(builder, value))


@typed(VECTOR, types.int64, types.int64, types.int64)
def load_first(builder: Any, address: Any, index: Any, count: Any) -> Any:
    """The first `count` lanes from float32 memory, zeros in the others; touches no memory behind them."""
    return builder.bitcast(load_first_bits(builder, address, index, count, I32), FLOATS)


@typed(VECTOR, types.int64, types.int64, types.int64)
def load_first_bf16(builder: Any, address: Any, index: Any, count: Any) -> Any:
    """The first `count` lanes from bfloat16 memory, zeros in the others; touches no memory behind them."""
    return widened(builder, load_first_bits(builder, address, index, count, I16))


@typed(types.void, types.int64, types.int64, VECTOR, types.int64)
def store_first(builder: Any, address: Any, index: Any, value: Any, count: Any) -> None:
    """Write only the first `count` lanes as float32."""
    _store_first(builder, address, index, count, builder.bitcast(value, BITS))


@typed(types.void, types.int64, types.int64, VECTOR, types.int64)
def store_first_bf16(builder: Any, address: Any, index: Any, value: Any, count: Any) -> None:
    """Write only the first `count` lanes as bfloat16."""
    _store_first(builder, address, index, count, narrowed(builder, value))


@jit
def load_any(address, index, count, bf16):  # type: ignore[no-untyped-def]  # Numba infers
    """The first `count` lanes (all where count >= WIDTH) of a float32 or bfloat16 array."""
    if bf16 != 0:
        if count >= WIDTH:
            return load_bf16(address, index)
        return load_first_bf16(address, index, count)
    if count >= WIDTH:
        return load(address, index)
    return load_first(address, index, count)


@jit
def store_any(address, index, value, count, bf16):  # type: ignore[no-untyped-def]  # Numba infers
    """Write the first `count` lanes (all where count >= WIDTH) to a float32 or bfloat16 array."""
    if bf16 != 0:
        if count >= WIDTH:
            store_bf16(address, index, value)
        else:
            store_first_bf16(address, index, value, count)
    elif count >= WIDTH:
        store(address, index, value)
    else:
        store_first(address, index, value, count)


@typed(types.float32, types.int64, types.int64)
def load_scalar(builder: Any, address: Any, index: Any) -> Any:
    """One float32 value."""
    return builder.load(pointer_to(builder, address, index, F32))


@typed(types.float32, types.int64, types.int64)
def load_scalar_bf16(builder: Any, address: Any, index: Any) -> Any:
    """One bfloat16 value as float32."""
    return widened(builder, builder.load(pointer_to(builder, address, index, I16)))


@typed(types.void, types.int64, types.int64, types.float32)
def store_scalar(builder: Any, address: Any, index: Any, value: Any) -> None:
    """Write one float32 value."""
    builder.store(value, pointer_to(builder, address, index, F32))


@typed(types.int64, types.int64, types.int64)
def load_int8(builder: Any, address: Any, index: Any) -> Any:
    """One int8 value."""
    return builder.sext(builder.load(pointer_to(builder, address, index, I8)), I64)


@typed(types.int64, types.int64, types.int64)
def load_int64(builder: Any, address: Any, index: Any) -> Any:
    """One int64 value."""
    return builder.load(pointer_to(builder, address, index, I64))


@typed(types.void, types.int64)
def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address ahead of reading it; any address will do."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))


@typed(types.void, types.int64)
def prefetch_to_write(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address ahead of writing it; any address will do."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(1), I32(3), I32(1))


# Arithmetic.


@typed(VECTOR, types.float32)
def broadcast(builder: Any, scalar: Any) -> Any:
    """A vector of one value."""
    return splat(builder, scalar)


@jit
def zeros() -> Any:
    """A vector of zeros."""
    return broadcast(0.0)


def _arithmetic(name: str) -> Any:
    @typed(VECTOR, VECTOR, VECTOR)
    def operation(builder: Any, x: Any, y: Any) -> Any:
        return getattr(builder, name)(x, y, flags=("contract",))

    return operation


def _overload(operation: Any, vectors: Any) -> None:
    """Let `operation` take vectors, or a vector and a scalar."""

    @overload(operation)
    def choose(x, y):  # type: ignore[no-untyped-def]  # Numba compares its signature with the lambdas'
        if isinstance(x, VectorType) and isinstance(y, VectorType):
            return lambda x, y: vectors(x, y)
        if isinstance(x, VectorType) and isinstance(y, types.Number):
            return lambda x, y: vectors(x, broadcast(y))
        if isinstance(x, types.Number) and isinstance(y, VectorType):
            return lambda x, y: vectors(broadcast(x), y)
        return None


_overload(operator.add, _arithmetic("fadd"))
_overload(operator.sub, _arithmetic("fsub"))
_overload(operator.mul, _arithmetic("fmul"))
_overload(operator.truediv, _arithmetic("fdiv"))


@typed(VECTOR, VECTOR)
def _negate(builder: Any, x: Any) -> Any:
    return builder.fneg(x)


@overload(operator.neg)
def _overload_neg(x):  # type: ignore[no-untyped-def]  # Numba compares its signature with the lambda's
    return (lambda x: _negate(x)) if isinstance(x, VectorType) else None


@typed(VECTOR, VECTOR, VECTOR, VECTOR)
def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return call_llvm(builder, f"llvm.fma.v{WIDTH}f32", FLOATS, x, y, z)


@typed(VECTOR, VECTOR, VECTOR, VECTOR, VECTOR)
def where_less(builder: Any, x: Any, y: Any, then: Any, otherwise: Any) -> Any:
    """Lane by lane, `then` where x < y, else `otherwise`; a NaN is not less."""
    return builder.select(builder.fcmp_ordered("<", x, y), then, otherwise)


@jit
def maximum(x, y):  # type: ignore[no-untyped-def]  # Numba infers
    """The larger of each lane; x where one of them is NaN."""
    return where_less(x, y, y, x)


@jit
def minimum(x, y):  # type: ignore[no-untyped-def]  # Numba infers
    """The smaller of each lane; x where one of them is NaN."""
    return where_less(y, x, y, x)


@typed(VECTOR, VECTOR)
def absolute(builder: Any, x: Any) -> Any:
    """The absolute value of each lane."""
    return call_llvm(builder, f"llvm.fabs.v{WIDTH}f32", FLOATS, x)


@typed(VECTOR, VECTOR)
def square_root(builder: Any, x: Any) -> Any:
    """The square root of each lane."""
    return call_llvm(builder, f"llvm.sqrt.v{WIDTH}f32", FLOATS, x)


@typed(types.float32, VECTOR)
def horizontal_sum(builder: Any, x: Any) -> Any:
    """The sum over the lanes, added pairwise."""
    return call_llvm(builder, f"llvm.vector.reduce.fadd.v{WIDTH}f32", F32, F32(0.0), x, fastmath=("reassoc",))


@typed(types.float32, VECTOR)
def horizontal_max(builder: Any, x: Any) -> Any:
    """The largest lane; NaNs do not count."""
    return call_llvm(builder, f"llvm.vector.reduce.fmax.v{WIDTH}f32", F32, x)


@typed(VECTOR, types.int64)
def sums_of_vectors(builder: Any, address: Any) -> Any:
    """Lane i is the sum over vector i of the WIDTH vectors at `address`: a transpose and a sum in one."""
    vectors = [builder.bitcast(load_bits(builder, address, I64(i * WIDTH), I32), FLOATS) for i in range(WIDTH)]
    half = 1
    while half < WIDTH:
        # Lanes are in runs of `half`. A pair (x, y) becomes x's even runs + x's odd runs, beside the same of y.
        even = [start + k for start in range(0, WIDTH, 2 * half) for k in (*range(half), *range(WIDTH, WIDTH + half))]
        odd = [lane + half for lane in even]
        vectors = [
            builder.fadd(
                builder.shuffle_vector(x, y, ir.Constant(BITS, even)),
                builder.shuffle_vector(x, y, ir.Constant(BITS, odd)),
            )
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        half *= 2
    return vectors[0]
