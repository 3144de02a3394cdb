"""S4's diagonal plus low-rank system (arXiv 2111.00396): its kernel by Cauchy sums, its step in O(n)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.lti.system import System


@dataclass(frozen=True)
class DplrSystem:
    """x' = (diag(L) - P^T conj(P)) x + B u,  y = 2 Re(C x), for each of d channels, in bilinear steps of dt.

    One of each conjugate pair is kept, m = n / 2; the low-rank sums run over both: conj(P) x stands for
    2 Re(sum conj(P_j) x_j).
    """

    eigenvalues: Tensor  # L [d m] complex, Re <= 0
    P: Tensor  # [r d m] complex
    B: Tensor  # [d m] complex
    C: Tensor  # [d m] complex
    dt: Tensor  # [d] above 0

    def kernel(self, length: int) -> Tensor:
        """K_k = C Abar^k Bbar, k = 0 .. length-1, [d l] real, from its generating function at the roots of unity z.

        Khat(z) = 2 C~ E^-1 B - 2 (1+z) C~ E^-1 P^T (I + (1+z) conj(P) E^-1 P^T)^-1 conj(P) E^-1 B with
        E = (2/dt) (1-z) - (1+z) L and C~ = C (I - Abar^length): the Cauchy sums of arXiv 2111.00396, algorithm 1,
        multiplied through by 1+z, so that z = -1 is no pole; the inverse is Woodbury's.
        """
        angles = -2 * math.pi / length * torch.arange(length // 2 + 1, dtype=torch.float64)
        z = torch.polar(torch.ones_like(angles), angles).to(self.B)
        a, b = 2 / self.dt.unsqueeze(-1) * (1 - z), 1 + z  # [d f], [f]
        lefts = torch.cat([self._truncated(length).unsqueeze(0), self.P.conj()])  # [1+r d m]
        rights = torch.cat([self.B.unsqueeze(0), self.P])
        sums = _cauchy(lefts.unsqueeze(1) * rights, self.eigenvalues, a, b)  # [1+r 1+r d f]
        inner = (b * sums[1:, 1:]).movedim((0, 1), (-2, -1))  # [d f r r]
        correction = (sums[0, 1:].movedim(0, -1) * _solve_with_identity(inner, sums[1:, 0].movedim(0, -1))).sum(-1)
        return torch.fft.irfft(2 * (sums[0, 0] - b * correction), n=length)

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One token in O(n): u [b d] and the state [b d m] before it; y [b d] and the state after it."""
        half = self.dt.unsqueeze(-1) / 2
        state = self._resolvent(state + half * self._A(state) + 2 * half * self.B * u.unsqueeze(-1))
        return 2 * (self.C * state).real.sum(-1), state

    def dense(self) -> System:
        """The same discrete system with a dense real Abar [d n n] over the states (Re x_1, Im x_1, Re x_2, ..)."""
        half = self.dt.unsqueeze(-1) / 2
        channels, pairs = self.B.shape
        basis = torch.eye(2 * pairs, dtype=self.dt.dtype, device=self.dt.device).view(2 * pairs, 1, pairs, 2)
        x = torch.view_as_complex(basis).expand(2 * pairs, channels, pairs)
        moved = torch.view_as_real(self._resolvent(x + half * self._A(x))).flatten(-2)  # [column d row]
        B = torch.view_as_real(self._resolvent(2 * half * self.B)).flatten(-2)
        C = 2 * torch.view_as_real(self.C.conj().resolve_conj()).flatten(-2)
        return System(moved.permute(1, 2, 0), B, C)

    def _A(self, x: Tensor) -> Tensor:
        """A x, for x [.. d m]."""
        return self.eigenvalues * x - _combine(self.P, self._project(x))

    def _resolvent(self, x: Tensor) -> Tensor:
        """(I - dt/2 A)^-1 x by Woodbury's identity, for x [.. d m]."""
        half = self.dt.unsqueeze(-1) / 2
        inverse = 1 / (1 - half * self.eigenvalues)
        gram = 2 * torch.einsum("rdm,sdm->drs", self.P.conj(), half * inverse * self.P).real
        x = inverse * x
        return x - half * inverse * _combine(self.P, _solve_with_identity(gram, self._project(x)))

    def _project(self, x: Tensor) -> Tensor:
        """conj(P) x over both of each pair: [.. d r], real, for x [.. d m]."""
        return 2 * (self.P.conj().movedim(0, -2) * x.unsqueeze(-2)).real.sum(-1)

    def _truncated(self, length: int) -> Tensor:
        """C (I - Abar^length), [d m]: what makes the generating function of finitely many terms a closed form."""
        system = self.dense()
        state = system.C.unsqueeze(-2)
        power, exponent = system.A, length
        while exponent:  # binary exponentiation on the row C
            state = state @ power if exponent & 1 else state
            power, exponent = (power @ power, exponent >> 1) if exponent > 1 else (power, 0)
        rest = torch.view_as_complex((state.squeeze(-2) / 2).unflatten(-1, (-1, 2)).contiguous()).conj()
        return self.C - rest


def _solve_with_identity(M: Tensor, y: Tensor) -> Tensor:
    """(I + M)^-1 y for M [.. r r], y [.. r]; a division for r = 1, HiPPO-LegS."""
    if M.shape[-1] == 1:
        return y / (1 + M.squeeze(-1))
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return torch.linalg.solve(identity + M, y.unsqueeze(-1)).squeeze(-1)


def _combine(P: Tensor, weights: Tensor) -> Tensor:
    """P^T weights: [.. d m] for P [r d m] and real weights [.. d r]."""
    return (P.movedim(0, -2) * weights.unsqueeze(-1)).sum(-2)


def _cauchy(v: Tensor, eigenvalues: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum over both of each pair of v / (a - b L): [.. d f] for v [.. d m], L [d m], a [d f], b [f].

    A pair's two terms are 2 (a Re v - b Re(v conj(L))) / (a^2 - 2 a b Re L + b^2 |L|^2): one division for both.
    """
    shift = -2 * eigenvalues.real.unsqueeze(-1) * (a * b).unsqueeze(-2)
    weights = 1 / ((a * a).unsqueeze(-2) + shift + (eigenvalues.abs() ** 2).unsqueeze(-1) * (b * b))  # [d m f]
    both = torch.stack([v.real, (v * eigenvalues.conj()).real], dim=-2).to(weights.dtype) @ weights  # [.. d 2 f]
    return 2 * (a * both[..., 0, :] - b * both[..., 1, :])
