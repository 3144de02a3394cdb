"""From x' = A x + B u to x_k = Abar x_{k-1} + Bbar u_k, for dense and for diagonal A."""

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_name

ALPHAS = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}
METHODS = (*ALPHAS, "zoh")


def discretize(A: Tensor, B: Tensor, dt: Tensor | float, method: str | float = "zoh") -> tuple[Tensor, Tensor]:
    """Abar and Bbar for steps of size dt.

    Generalised bilinear (arXiv 2110.13985, section 2): Abar = (I - a dt A)^-1 (I + (1 - a) dt A),
    Bbar = dt (I - a dt A)^-1 B, with a = 0 "euler", 1/2 "bilinear", 1 "backward_euler", or a number.
    "zoh" (u constant over a step): Abar = exp(dt A), Bbar = A^-1 (exp(dt A) - I) B.

    Args:
        A: dense [.. n n], or the diagonal [.. n], float or complex. Told apart by B, which has one dimension less than
            a dense A.
        B: [.. n].
        dt: above 0; a number, or [..].
        method: "euler", "bilinear", "backward_euler", "zoh", or the number a in 0 .. 1.

    Returns:
        Abar like A and Bbar like B, differentiable.

    Raises:
        UserError: unknown method, a outside 0 .. 1, or shapes of A and B that do not fit.

    Numerics: dense "zoh" is the exponential of [[A, B], [0, 0]] dt, which needs no inverse of A; a diagonal one uses
    expm1, so that Bbar stays exact for small dt A. "euler" is unstable where |1 + dt A| > 1.
    """
    if A.shape not in (B.shape, (*B.shape, B.shape[-1])):
        raise UserError(f"discretize: A must be [.. n n] or [.. n] for B {list(B.shape)}, got {list(A.shape)}")
    if isinstance(method, str):
        check_name("discretization", method, METHODS)
    elif not 0 <= method <= 1:
        raise UserError(f"discretize: the number of the bilinear form must be 0 to 1, got {method}")
    step = dt.unsqueeze(-1) if isinstance(dt, Tensor) else dt
    if A.dim() == B.dim():
        return _diagonal(A, B, step, method)
    rate = A * (step.unsqueeze(-1) if isinstance(step, Tensor) else step)
    if method == "zoh":
        return _dense_zoh(rate, B * step)
    alpha = ALPHAS[method] if isinstance(method, str) else method
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    both = torch.cat([identity + (1 - alpha) * rate, (B * step).unsqueeze(-1)], dim=-1)
    if alpha:
        both = torch.linalg.solve(identity - alpha * rate, both)
    return both[..., :-1], both[..., -1]


def _dense_zoh(rate: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.nn.functional.pad(torch.cat([rate, B.unsqueeze(-1)], dim=-1), (0, 0, 0, 1))
    exponential = torch.linalg.matrix_exp(both)
    return exponential[..., :-1, :-1], exponential[..., :-1, -1]


def _diagonal(A: Tensor, B: Tensor, step: Tensor | float, method: str | float) -> tuple[Tensor, Tensor]:
    rate = A * step
    if method == "zoh":
        return torch.exp(rate), torch.expm1(rate) / A * B
    alpha = ALPHAS[method] if isinstance(method, str) else method
    inverse = 1 / (1 - alpha * rate)
    return (1 + (1 - alpha) * rate) * inverse, inverse * step * B
