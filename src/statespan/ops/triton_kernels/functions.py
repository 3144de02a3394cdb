# pyright: basic, reportMissingParameterType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# Triton infers the types of kernels, and Python's reading of its language is another.
# ruff: noqa: RET505  # without the else, Triton compiles what follows an early return too
"""Functions for use inside Triton kernels, in float32; each as exact as PyTorch's to a few roundings."""

import triton
import triton.language as tl


@triton.jit
def both(mask, condition):
    """A block's mask where a scalar condition holds; `&` of the two is an integer in the interpreter."""
    return tl.where(condition, mask, False)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); the square of the reciprocal root, which is one instruction where a division is many."""
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def silu_slope(x, gate):
    """The derivative of x * sigmoid(x), with gate = sigmoid(x)."""
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)).

    The hardware's logarithm is exact to 2^-22 of 1, which is nothing like enough near log(1); log1p(e) is
    2 atanh(e / (2 + e)), whose series needs 8 terms up to e = 1.
    """
    e = tl.exp(-tl.abs(x))
    ratio = e / (2.0 + e)
    square = ratio * ratio
    series = 1.0 / 15.0
    for odd in tl.static_range(13, 0, -2):
        series = series * square + 1.0 / odd
    return tl.maximum(x, 0.0) + 2.0 * ratio * series


@triton.jit
def mean_decay(step):
    """(exp(step) - 1) / step, 1 at 0: the mean of exp over [0, step]."""
    series = step * 0.0 + 1.0
    for place in tl.static_range(8, 1, -1):
        series = 1.0 + series * step / place
    small = tl.abs(step) < 0.5
    return tl.where(small, series, (tl.exp(step) - 1.0) / tl.where(small, 1.0, step))


@triton.jit
def discretize(dt, A, DISCRETIZATION: tl.constexpr):
    """Abar and the factor that turns B into Bbar."""
    step = dt * A
    if DISCRETIZATION == "mamba":
        return tl.exp(step), dt + step * 0.0
    elif DISCRETIZATION == "zoh":
        return tl.exp(step), dt * mean_decay(step)
    else:
        tl.static_assert(DISCRETIZATION == "bilinear")
        return (1.0 + step / 2.0) / (1.0 - step / 2.0), dt / (1.0 - step / 2.0)
