"""HiPPO matrices (arXiv 2008.07669) and their normal plus low-rank and diagonal plus low-rank forms (arXiv 2111.00396).

A measure says which past the state remembers: "legs" all of it, evenly; "legt" a sliding window, evenly; "lagt" all of
it, fading exponentially.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_name

Measure = Literal["legs", "legt", "lagt"]
MEASURES = ("legs", "legt", "lagt")


def hippo_matrices(measure: str, state_size: int) -> tuple[Tensor, Tensor]:
    """A and B of x' = A x + B u whose state x holds the coefficients of the past of u on orthonormal polynomials.

    "legs": A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 for n < k; B_n = sqrt(2n+1). HiPPO's own system is
    x' = (A x + B u) / t, whose polynomials span [0, t]; S4 drops 1/t and so remembers with exponential decay.
    "legt": A_nk = -sqrt((2n+1)(2k+1)) (1 for n >= k, (-1)^(n-k) for n < k); B_n = sqrt(2n+1); the window is one unit of
    time long (arXiv 2008.07669, appendix D.1, in the orthonormal scaling).
    "lagt": A_nk = -1 for n > k, -1/2 for n = k, 0 for n < k; B_n = 1 (appendix D.2, for the functions
    e^(-s/2) L_n(s) of the age s, which are orthonormal without a weight).

    Args:
        measure: "legs", "legt" or "lagt".
        state_size: n, at least 1.

    Returns:
        A [n n] and B [n], float64.

    Raises:
        UserError: unknown measure, or no state.
    """
    check_name("measure", measure, MEASURES)
    if state_size < 1:
        raise UserError(f"hippo_matrices: state_size must be at least 1, got {state_size}")
    n = torch.arange(state_size, dtype=torch.float64)
    row, column = n.unsqueeze(1), n.unsqueeze(0)
    if measure == "lagt":
        return -(row > column).double() - torch.eye(state_size, dtype=torch.float64) / 2, torch.ones_like(n)
    B = torch.sqrt(2 * n + 1)
    if measure == "legs":
        return -torch.outer(B, B).tril(-1) - torch.diag(n + 1), B
    sign = torch.where(row >= column, 1.0, (-1.0) ** (column - row))
    return -torch.outer(B, B) * sign, B


@dataclass(frozen=True)
class Dplr:
    """A = V (diag(L) - P^T conj(P)) V*, in complex128, of which one of each conjugate pair is kept: m = n / 2.

    A real vector x of the original state is x = 2 Re(V z) for the kept coordinates z = V* x.
    """

    eigenvalues: Tensor  # L [m], of the normal part, Im > 0
    P: Tensor  # [r m], V* of the low-rank factor
    B: Tensor  # [m], V* B; real and above 0
    V: Tensor  # [n m], orthonormal eigenvectors of the normal part


def nplr_factor(measure: str, state_size: int) -> Tensor:
    """P with A + P^T P normal: -1/2 I + skew for "legs", skew for the others (arXiv 2111.00396, appendix C.1).

    Args:
        measure: "legs", "legt" or "lagt".
        state_size: n.

    Returns:
        P [r n], float64; the rank r is 2 for "legt", else 1.

    Raises:
        UserError: unknown measure.
    """
    n = torch.arange(state_size, dtype=torch.float64)
    check_name("measure", measure, MEASURES)
    if measure == "legs":
        return torch.sqrt(n + 0.5).unsqueeze(0)
    if measure == "lagt":
        return torch.full((1, state_size), 0.5**0.5, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    return torch.stack([B * (n % 2 == 0), B * (n % 2 == 1)])


def dplr(measure: str, state_size: int) -> Dplr:
    """The diagonal plus low-rank form of a HiPPO matrix (arXiv 2111.00396, theorem 1).

    Args:
        measure: "legs", "legt" or "lagt".
        state_size: n, even.

    Raises:
        UserError: unknown measure, or an odd number of states.

    Numerics: the normal part is c I + S with S skew, so its eigenvectors come from the Hermitian -iS: orthonormal to
    rounding, where those of A itself have entries beyond 2^n. Phases are fixed by B > 0.
    """
    if state_size < 2 or state_size % 2:
        raise UserError(f"dplr: state_size must be even, got {state_size}: states come in conjugate pairs")
    A, B = hippo_matrices(measure, state_size)
    P = nplr_factor(measure, state_size)
    normal = A + P.T @ P
    skew = (normal - normal.T) / 2
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    kept = slice(state_size // 2, None)  # eigh sorts: the upper half is positive
    V = vectors[:, kept]
    phase = torch.sgn(V.mH @ B.to(V.dtype))
    V = V * phase
    eigenvalues = torch.complex(normal.diagonal().mean().expand(state_size // 2), frequencies[kept])
    return Dplr(eigenvalues, (V.mH @ P.T.to(V.dtype)).T, (V.mH @ B.to(V.dtype)).real.to(V.dtype), V)


def diagonal_eigenvalues(init: str, state_size: int) -> Tensor:
    """Initial diagonals of S4D (arXiv 2206.11893, section 4): one of each conjugate pair, m = n / 2, or n real ones.

    "legs": those of the normal part of LegS; "lin": -1/2 + i pi k (the Mamba paper prints it without pi);
    "inv": -1/2 + i n/pi (n / (2k+1) - 1); "real": -(k+1), the eigenvalues of LegS itself.

    Args:
        init: "legs", "lin", "inv" or "real".
        state_size: n; even, but for "real".

    Returns:
        [m] complex128, or for "real" [n] float64.

    Raises:
        UserError: unknown name, or an odd number of states.
    """
    check_name("initial values", init, ("legs", "lin", "inv", "real"))
    if init == "real":
        return -torch.arange(1, state_size + 1, dtype=torch.float64)
    if init == "legs":
        return dplr("legs", state_size).eigenvalues
    if state_size < 2 or state_size % 2:
        raise UserError(f"diagonal_eigenvalues: state_size must be even, got {state_size}: states come in pairs")
    k = torch.arange(state_size // 2, dtype=torch.float64)
    frequencies = math.pi * k if init == "lin" else state_size / math.pi * (state_size / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(k, -0.5), frequencies)
