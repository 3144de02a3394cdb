"""What a HiPPO state remembers: coefficients of a signal's past after each sample, and the past from them."""

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_name
from statespan.ops.lti.discretization import discretize
from statespan.ops.lti.hippo import MEASURES, hippo_matrices


def project(signal: Tensor, measure: str, state_size: int, *, span: float | None = None) -> Tensor:
    """Coefficients of a signal's past on the polynomials of a HiPPO measure, after every sample.

    "legs": c_k = (I - A/2k)^-1 ((I + A/2k) c_{k-1} + B/k u_k), the bilinear form of c' = (A c + B u) / t
    (arXiv 2008.07669, section 3.2). "legt", "lagt": the bilinear form of c' = (A c + B u) / span.

    Args:
        signal: [.. t], float.
        measure: "legs", "legt" or "lagt".
        state_size: n, number of polynomials.
        span: in samples, the length of the window ("legt") or of the unit of age ("lagt"); None for "legs", which
            needs none.

    Returns:
        [.. t n], in the signal's dtype and differentiable in it.

    Raises:
        UserError: unknown measure; a span that is missing, not above 0, or given to "legs".
    """
    check_name("measure", measure, MEASURES)
    if (measure == "legs") != (span is None) or (span is not None and span <= 0):
        raise UserError(f"project: measure {measure!r} takes {'no span' if measure == 'legs' else 'a span above 0'}")
    A, B = (x.to(signal) for x in hippo_matrices(measure, state_size))
    coefficients = signal.new_zeros(*signal.shape[:-1], state_size)
    out: list[Tensor] = []
    discrete = None if span is None else discretize(A, B, 1 / span, "bilinear")
    for k, sample in enumerate(signal.unbind(-1), start=1):
        Abar, Bbar = discrete or discretize(A, B, 1 / k, "bilinear")
        coefficients = coefficients @ Abar.T + sample.unsqueeze(-1) * Bbar
        out.append(coefficients)
    return torch.stack(out, dim=-2)


def reconstruct(coefficients: Tensor, measure: str, ages: Tensor) -> Tensor:
    """The past from its coefficients: u(age) = sum_n c_n p_n(age).

    Args:
        coefficients: [.. n], of `project`.
        measure: "legs", "legt" or "lagt".
        ages: [a], how long ago, as a share of all that has passed ("legs"), of the window ("legt"), or in spans
            ("lagt"); 0 is now, and 1 the oldest that "legs" and "legt" know.

    Returns:
        [.. a].

    Raises:
        UserError: unknown measure.
    """
    return coefficients @ basis(measure, coefficients.shape[-1], ages.to(coefficients)).T


def basis(measure: str, state_size: int, ages: Tensor) -> Tensor:
    """The orthonormal functions p_n(age).

    Legendre: p_n = sqrt(2n+1) P_n(1 - 2 age) on [0, 1], as u is newest where P_n is 1; Laguerre:
    p_n = e^(-age/2) L_n(age) on [0, inf).

    Args:
        measure: "legs" or "legt" (Legendre), or "lagt" (Laguerre).
        state_size: n, number of functions.
        ages: [a], as for `reconstruct`.

    Returns:
        [a n], in the dtype of `ages`.

    Raises:
        UserError: unknown measure.
    """
    check_name("measure", measure, MEASURES)
    x = ages if measure == "lagt" else 1 - 2 * ages
    first = torch.exp(-ages / 2) if measure == "lagt" else torch.ones_like(ages)
    values = [first, (1 - x if measure == "lagt" else x) * first]
    for n in range(1, state_size - 1):  # (n+1) p_{n+1} = .. p_n - n p_{n-1}
        factor = 2 * n + 1 - x if measure == "lagt" else (2 * n + 1) * x
        values.append((factor * values[n] - n * values[n - 1]) / (n + 1))
    functions = torch.stack(values[:state_size], dim=-1)
    if measure == "lagt":
        return functions
    return functions * torch.sqrt(2 * torch.arange(state_size).to(ages) + 1)
