"""A discrete linear time-invariant system: its kernel, what a state still says, and what inputs leave in the state.

All three come from two short tables, of the first and of every T-th power of A with T near sqrt(length), whose matrix
product holds all powers: memory O(n sqrt(length)) instead of the O(n length) of a Vandermonde matrix.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class System:
    """x_k = A x_{k-1} + B u_k,  y_k = C x_k, for each of d channels with one input and one output.

    A is diagonal [d n] or dense [d n n]; B and C are [d n]. Complex tensors stand for one of each conjugate pair:
    y_k = 2 Re(C x_k).
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def kernel(self, length: int) -> Tensor:
        """K_k = C A^k B, k = 0 .. length-1, [d l] real: Krylov for a dense A, Vandermonde for a diagonal one."""
        inner, outer = _tables(length)
        columns = _powers_times(self.A, self.B, inner)
        rows = _powers_times(_transpose(_power(self.A, inner)), self.C, outer)
        return real_output(rows.mT @ columns).flatten(-2)[..., :length]

    def free_response(self, state: Tensor, length: int) -> Tensor:
        """C A^(k+1) x, k = 0 .. length-1, for `state` x [b d n]: [b d l], what is heard of it later without input."""
        inner, outer = _tables(length)
        rows = _powers_times(_transpose(self.A), _times(_transpose(self.A), self.C.unsqueeze(-1)).squeeze(-1), inner)
        starts = _powers_times(_power(self.A, inner), state, outer)
        return real_output(starts.mT @ rows).flatten(-2)[..., :length]

    def absorb(self, u: Tensor) -> Tensor:
        """sum_k A^(l-1-k) B u_k, the state [b d n] that inputs u [b d l] leave when it was zero."""
        length = u.shape[-1]
        inner, outer = _tables(length)
        blocks = pad(u, (inner * outer - length, 0)).unflatten(-1, (outer, inner)).to(self.B.dtype)
        states = (blocks @ _powers_times(self.A, self.B, inner).flip(-1).mT).mT  # [b d n outer]
        power = _power(self.A, inner)
        while states.shape[-1] > 1:
            states = pad(states, (states.shape[-1] % 2, 0))
            states = _times(power, states[..., ::2]) + states[..., 1::2]
            power = _square(power)
        return states.squeeze(-1)

    def advance(self, state: Tensor, steps: Tensor, most: int) -> Tensor:
        """A^steps x for `state` [b d n] and `steps` [b], none above `most`."""
        power = self.A
        for bit in range(most.bit_length()):
            moved = _times(power, state.unsqueeze(-1)).squeeze(-1)
            state = torch.where((steps >> bit & 1).bool().view(-1, 1, 1), moved, state)
            power = _square(power)
        return state

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One token: u [b d] and the state [b d n] before it; y [b d] and the state after it."""
        state = _times(self.A, state.unsqueeze(-1)).squeeze(-1) + self.B * u.unsqueeze(-1)
        return real_output(self.C * state).sum(-1), state


def real_output(y: Tensor) -> Tensor:
    """y itself, or the sum of y and its conjugate."""
    return 2 * y.real if y.is_complex() else y


def _tables(length: int) -> tuple[int, int]:
    """How many single powers and how many jumps of as many make up `length`."""
    inner = math.isqrt(max(length - 1, 0)) + 1
    return inner, -(-length // inner)


def _times(A: Tensor, x: Tensor) -> Tensor:
    """A x for x [.. d n l]."""
    return A @ x if A.dim() == 3 else A.unsqueeze(-1) * x


def _square(A: Tensor) -> Tensor:
    return A @ A if A.dim() == 3 else A * A


def _transpose(A: Tensor) -> Tensor:
    return A.mT if A.dim() == 3 else A


def _power(A: Tensor, exponent: int) -> Tensor:
    """A^exponent, exponent at least 1, by repeated squaring."""
    if exponent == 1:
        return A
    half = _square(_power(A, exponent // 2))
    return (half @ A if A.dim() == 3 else half * A) if exponent % 2 else half


def _powers_times(A: Tensor, x: Tensor, length: int) -> Tensor:
    """A^k x, k = 0 .. length-1, as [.. d n l] for x [.. d n]; the table doubles in each round."""
    table = x.unsqueeze(-1)
    while table.shape[-1] < length:
        missing = length - table.shape[-1]
        table = torch.cat([table, _times(A, table[..., :missing])], dim=-1)
        A = _square(A)
    return table
