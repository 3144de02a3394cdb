"""Linear time-invariant state-space models: HiPPO, discretisations, kernels, and one layer's three views.

Plain PyTorch on any device, with gradients by autograd; complex numbers are one of each conjugate pair.
"""

from typing import Any

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import check_devices, check_dim, check_shape, check_steps
from statespan.ops.lti.convolution import causal_convolution
from statespan.ops.lti.discretization import discretize
from statespan.ops.lti.dplr import DplrSystem
from statespan.ops.lti.hippo import Dplr, diagonal_eigenvalues, dplr, hippo_matrices, nplr_factor
from statespan.ops.lti.projection import basis, project, reconstruct
from statespan.ops.lti.runs import Runs
from statespan.ops.lti.system import System

__all__ = [
    "Dplr",
    "DplrSystem",
    "System",
    "basis",
    "causal_convolution",
    "diagonal_eigenvalues",
    "discretize",
    "dplr",
    "hippo_matrices",
    "lti_scan",
    "nplr_factor",
    "project",
    "reconstruct",
]


def lti_scan(
    u: Tensor,
    system: System | DplrSystem,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    return_final_state: bool = False,
) -> Any:
    """A linear time-invariant system on whole sequences, by the FFT: the convolutional view.

    y = K * u + D u, K_k = C A^k B, equals x_k = A x_{k-1} + B u_k, y_k = C x_k + D u_k   (arXiv 2111.00396, (3)-(5)).
    `reference.lti_scan` is that recurrence, `system.step` one token of it.

    Args:
        u: [b t d], float.
        system: of d channels and n states: A diagonal or dense, or S4's diagonal plus low-rank form.
        D: [d], float.
        initial_state: [b d n] in the dtype of system.B, or None for zeros. Differentiable.
        segments: [b t], int. The state restarts from zero where the number changes; negative numbers are padding, which
            leaves the state as it is and whose output is zero.
        return_final_state: also return the state after the row's last real token.

    Returns:
        y [b t d] in the real dtype of system; with return_final_state also the state [b d n], differentiable.

    Raises:
        UserError: shapes or devices disagree, or there is no token.

    Numerics: FFTs in the dtype of system, float32 or float64. With segments each run of tokens is convolved on its own,
    in batches of runs whose lengths differ by less than 2: at most twice the work of one row, and the lengths are read
    on the host, so that such a call waits for a GPU and cannot be captured in a CUDA graph. States cost O(n) a token
    and channel; those of a diagonal plus low-rank system go through its dense form, O(n^2 sqrt(t) + n t).

    Example:
        >>> A, B = torch.full((2, 1), 0.5), torch.ones(2, 1)
        >>> lti_scan(torch.ones(1, 3, 2), System(A, B, B))[0, :, 0]
        tensor([1.0000, 1.5000, 1.7500])
    """
    _check(u, system, D, initial_state, segments)
    kernel = system.kernel(u.shape[1])
    u, runs = u.to(kernel.dtype), None if segments is None else Runs.of(segments)
    if runs is not None:
        u = torch.where(runs.real.unsqueeze(-1), u, 0)
    y = causal_convolution(u, kernel) if runs is None else runs.convolve(u, kernel)
    if D is not None:
        y = y + D * u
    if initial_state is None and not return_final_state:
        return y
    if isinstance(system, System):
        heard, final = _through_state(u, system, initial_state, runs, return_final_state)
    else:
        real_state = None if initial_state is None else torch.view_as_real(initial_state).flatten(-2)
        heard, final = _through_state(u, system.dense(), real_state, runs, return_final_state)
        final = None if final is None else torch.view_as_complex(final.unflatten(-1, (-1, 2)))
    y = y if heard is None else y + heard
    return (y, final) if return_final_state else y


def _through_state(
    u: Tensor, system: System, state: Tensor | None, runs: Runs | None, want_final: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What the initial state adds to y [b t d], and the state after the last real token."""
    length, heard, final = u.shape[1], None, None
    if state is not None:
        response = system.free_response(state, length)
        heard = response.transpose(1, 2) if runs is None else runs.spread_over_first(response)
    if want_final:
        inputs = u if runs is None else runs.last_at_the_end(u)
        final = system.absorb(inputs.transpose(1, 2))
        if state is not None and runs is None:
            final = final + system.advance(state, torch.full(u.shape[:1], length, device=u.device), length)
        elif state is not None and runs is not None:
            kept = system.advance(state, runs.first.sum(dim=1), length)
            final = final + torch.where(runs.only.view(-1, 1, 1), kept, 0)
    return heard, final


def _check(
    u: Tensor, system: System | DplrSystem, D: Tensor | None, initial_state: Tensor | None, segments: Tensor | None
) -> None:
    op = "lti_scan"
    check_dim(op, "u", u, "[b t d]")
    (batch, length, channels), states = u.shape, system.B.shape[-1]
    check_steps(op, "u", u, "[b t d]")
    A = system.A if isinstance(system, System) else system.eigenvalues
    if A.shape not in ((channels, states), (channels, states, states)):
        raise UserError(f"{op}: A must be [d n] or [d n n] with d = {channels}, got {list(A.shape)}")
    check_shape(op, "B", system.B, "[d n]", (channels, states))
    check_shape(op, "C", system.C, "[d n]", (channels, states))
    check_shape(op, "D", D, "[d]", (channels,))
    check_shape(op, "initial_state", initial_state, "[b d n]", (batch, channels, states))
    check_shape(op, "segments", segments, "[b t]", (batch, length))
    check_devices(op, u=u, A=A, D=D, initial_state=initial_state, segments=segments)
