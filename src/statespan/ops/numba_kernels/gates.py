"""sigmoid and SiLU for kernels that move memory: one exp2 and one division, good to about 1e-6 of the largest output.

`special_functions.sigmoid` is exact to the last bits of every output, small ones too, and costs twice as much.
"""

import math

from statespan.ops.numba_kernels.special_functions import exp2
from statespan.ops.numba_kernels.vector import jit

LOG2_E = 1 / math.log(2)


@jit
def fast_sigmoid(x):  # type: ignore[no-untyped-def]  # Numba infers
    """1 / (1 + e^-x)."""
    return 1.0 / (exp2(x * -LOG2_E) + 1.0)


@jit
def fast_silu(x):  # type: ignore[no-untyped-def]  # Numba infers
    """x / (1 + e^-x)."""
    return x / (exp2(x * -LOG2_E) + 1.0)


@jit
def silu_slope(x, sigmoid_x):  # type: ignore[no-untyped-def]  # Numba infers
    """The derivative of SiLU at x, given sigmoid(x)."""
    return sigmoid_x * (x * (1.0 - sigmoid_x) + 1.0)
