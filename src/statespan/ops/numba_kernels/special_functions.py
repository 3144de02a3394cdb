"""exp and its relatives on vectors, as polynomials. For kernel modules; importing it imports Numba.

Each is good to a few units in the last place of float32. The polynomial of 2^f is 1 + f (ln 2 + ...) with the 1 exact,
so that exp(-small) keeps what tells a long memory from an endless one.
"""

import math
from typing import Any

from statespan.ops.numba_kernels.host import has_avx512
from statespan.ops.numba_kernels.vector import (
    BITS,
    F32,
    FLOATS,
    I16,
    I32,
    VECTOR,
    absolute,
    broadcast,
    call_llvm,
    constant,
    fma,
    jit,
    maximum,
    minimum,
    typed,
    where_less,
    zeros,
)

LOG2_E = 1 / math.log(2)
_LOG2_E_REST = 1.92596298909109e-08  # log2(e) minus its float32 value
# Minimax coefficients of ((2^f - 1) / f - ln 2) / f on |f| <= 1/2: 2^f is then right to 1.05e-7.
_P2, _P3, _P4, _P5 = 0.24022282660007477, 0.05550558492541313, 0.009669691324234009, 0.0013300605351105332
# Minimax coefficients of (atanh(s) / s - 1) / s^2 in powers of s^2 on s <= 1/3: atanh is then right to 5e-9.
_Q1, _Q2, _Q3, _Q4 = 0.33333208142721316, 0.20010763627620673, 0.1400090248274664, 0.1400599425706557
_ROUNDER = 1.5 * 2**23  # added to |x| < 2^22 it rounds to an integer, which then stands in the lowest bits


@typed(VECTOR, VECTOR)
def _fraction(builder: Any, x: Any) -> Any:
    """AVX-512: x minus the nearest integer."""
    name = "llvm.x86.avx512.mask.reduce.ps.512"
    return call_llvm(builder, name, FLOATS, x, I32(8), constant(F32, 0.0), I16(-1), I32(4))


@typed(VECTOR, VECTOR, VECTOR)
def _scale(builder: Any, x: Any, exponent: Any) -> Any:
    """AVX-512: x * 2^floor(exponent); overflows to infinity and underflows to zero."""
    name = "llvm.x86.avx512.mask.scalef.ps.512"
    return call_llvm(builder, name, FLOATS, x, exponent, constant(F32, 0.0), I16(-1), I32(4))


@typed(VECTOR, VECTOR, VECTOR)
def _exact_difference(builder: Any, x: Any, y: Any) -> Any:
    """x - y, never fused with a product in x: the result must be an integer."""
    return builder.fsub(x, y)


@typed(VECTOR, VECTOR, VECTOR)
def _add_exponent(builder: Any, x: Any, rounded: Any) -> Any:
    """x * 2^n by adding n, the lowest bits of `rounded`, to the exponent bits of x."""
    shifted = builder.shl(builder.bitcast(rounded, BITS), constant(I32, 23))
    return builder.bitcast(builder.add(builder.bitcast(x, BITS), shifted), FLOATS)


@jit
def _fractional_power(f):  # type: ignore[no-untyped-def]  # Numba infers
    """2^f - 1 for |f| <= 1/2."""
    return ((((_P5 * f + _P4) * f + _P3) * f + _P2) * f + math.log(2)) * f


if has_avx512():

    @jit
    def _split(x):  # type: ignore[no-untyped-def]  # Numba infers
        """The fraction f of x, |f| <= 1/2, and x - f in the form that `_raise` takes."""
        f = _fraction(x)
        return f, _exact_difference(x, f)

    @jit
    def _raise(p, x, integer):  # type: ignore[no-untyped-def]  # Numba infers
        """p * 2^integer."""
        return _scale(p, integer)

else:

    @jit
    def _split(x):  # type: ignore[no-untyped-def]  # Numba infers
        """The fraction f of x, |f| <= 1/2, and x - f in the form that `_raise` takes."""
        x = minimum(x, broadcast(128.0))
        rounded = x + _ROUNDER
        return x - (rounded - _ROUNDER), rounded

    @jit
    def _raise(p, x, rounded):  # type: ignore[no-untyped-def]  # Numba infers
        """p * 2^rounded; 0 where x < -126, infinity where x >= 128."""
        return where_less(x, broadcast(-126.0), zeros(), _add_exponent(p, rounded))


@jit
def exp2(x):  # type: ignore[no-untyped-def]  # Numba infers
    """2^x; underflows to 0 and overflows to infinity."""
    f, integer = _split(x)
    return _raise(_fractional_power(f) + 1.0, x, integer)


@jit
def exp2_minus_1(x):  # type: ignore[no-untyped-def]  # Numba infers
    """(2^x, 2^x - 1), the second without cancellation near x = 0; x is clamped to [-150, 127]."""
    x = maximum(minimum(x, broadcast(127.0)), broadcast(-150.0))
    f, integer = _split(x)
    tail = _fractional_power(f)
    scale = _raise(broadcast(1.0), x, integer)
    return scale * (tail + 1.0), scale * tail + (scale - 1.0)


@jit
def exp(x):  # type: ignore[no-untyped-def]  # Numba infers
    """e^x; underflows to 0 and overflows to infinity."""
    x = maximum(minimum(x, broadcast(89.0)), broadcast(-105.0))
    power = x * LOG2_E
    lost = fma(x, broadcast(LOG2_E), -power) + x * _LOG2_E_REST  # what rounding took from the power
    return exp2(power) * (lost * math.log(2) + 1.0)


@jit
def softplus_and_sigmoid(x):  # type: ignore[no-untyped-def]  # Numba infers
    """log(1 + e^x), which above 20 is x to the last bit, and its derivative 1 / (1 + e^-x)."""
    y = exp(-absolute(x))
    s = y / (y + 2.0)  # log(1 + y) = 2 atanh(y / (2 + y))
    square = s * s
    tail = (((_Q4 * square + _Q3) * square + _Q2) * square + _Q1) * square
    return maximum(x, zeros()) + 2.0 * (s * tail + s), where_less(x, zeros(), y, broadcast(1.0)) / (y + 1.0)


@jit
def softplus(x):  # type: ignore[no-untyped-def]  # Numba infers
    """log(1 + e^x); above 20 it is x to the last bit."""
    return softplus_and_sigmoid(x)[0]


@jit
def sigmoid(x):  # type: ignore[no-untyped-def]  # Numba infers
    """1 / (1 + e^-x)."""
    return softplus_and_sigmoid(x)[1]


@jit
def silu(x):  # type: ignore[no-untyped-def]  # Numba infers
    """x sigmoid(x)."""
    return x * sigmoid(x)
