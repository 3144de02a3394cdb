"""HiPPO: the matrices and their normal forms, discretisations, and what a state remembers of a signal."""

import math

import pytest
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.lti import basis, discretize, dplr, hippo_matrices, nplr_factor, project, reconstruct

MEASURES = ["legs", "legt", "lagt"]
F64 = torch.float64


def signal(length: int, waves: int = 6, seed: int = 3) -> Tensor:
    """A random sum of sines with 1 to `waves` periods, in `length` samples."""
    generator = torch.Generator().manual_seed(seed)
    weights, phases = torch.rand(2, waves, generator=generator, dtype=F64)
    time = (torch.arange(length, dtype=F64) + 0.5).unsqueeze(1) / length
    return (weights * torch.sin(2 * math.pi * (time * torch.arange(1, waves + 1) + phases))).sum(1)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("measure", MEASURES)
def test_matrices_follow_from_the_basis(measure: str) -> None:
    """c = integral of u(t - age) p(age) gives c' = A c + B u by parts: A = <p', p> - p(oldest) p(oldest)^T, B = p(now).

    LegS has the ages t age, so that t c' = <((1 - age) p)', u> + p(now) u.
    """
    A, B = hippo_matrices(measure, 7)
    ages = torch.linspace(0, 80 if measure == "lagt" else 1, 200_001, dtype=F64)
    p = basis(measure, 7, ages)

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return torch.trapezoid(x.unsqueeze(2) * y.unsqueeze(1), ages, dim=0)

    torch.testing.assert_close(inner(p, p), torch.eye(7, dtype=F64), atol=1e-6, rtol=0)
    torch.testing.assert_close(p[0], B)
    slope = torch.gradient(p, spacing=(ages,), dim=0, edge_order=2)[0]
    if measure == "legs":
        expected = inner(slope * (1 - ages).unsqueeze(1), p) - inner(p, p)
    else:
        expected = inner(slope, p) - torch.outer(p[-1], p[-1])
    torch.testing.assert_close(A, expected, atol=1e-5, rtol=0)


def test_legs_is_the_published_matrix() -> None:
    A, B = hippo_matrices("legs", 3)
    torch.testing.assert_close(A, -torch.tensor([[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], dtype=F64))
    torch.testing.assert_close(B, torch.tensor([1, 3**0.5, 5**0.5], dtype=F64))
    assert torch.linalg.eigvals(hippo_matrices("legs", 9)[0]).real.sort().values.tolist() == list(range(-9, 0))


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_dplr_is_the_same_matrix(measure: str, size: int) -> None:
    A, B = hippo_matrices(measure, size)
    P, form = nplr_factor(measure, size), dplr(measure, size)
    normal = A + P.T @ P
    shift = -0.5 if measure == "legs" else 0.0
    scale = float(A.abs().max())
    torch.testing.assert_close(normal + normal.T, 2 * shift * torch.eye(size, dtype=F64), atol=1e-14 * scale, rtol=0)
    diagonal = torch.diag(form.eigenvalues)
    rebuilt = 2 * (form.V @ diagonal @ form.V.mH).real - P.T @ P
    torch.testing.assert_close(rebuilt, A, atol=1e-13 * scale, rtol=0)
    torch.testing.assert_close(2 * (form.V @ form.B).real, B, atol=1e-12, rtol=0)
    torch.testing.assert_close(2 * (form.V @ form.P.T).real, P.T, atol=1e-12, rtol=0)
    assert (form.eigenvalues.imag > 0).all()
    assert (form.B.real > 0).all()


def test_frequencies_of_legs_64() -> None:
    assert dplr("legs", 64).eigenvalues.imag.max() == pytest.approx(1303.27, abs=0.01)  # near 64^2 / pi = 1303.80


def test_reconstruction_improves_with_states() -> None:
    u = signal(2000)
    ages = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    errors = [relative_error(reconstruct(project(u, "legs", n)[-1], "legs", ages), u.flip(0)) for n in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5 and errors[-1] < 0.01


def test_legs_is_blind_to_the_time_scale() -> None:
    """A signal twice as slow leaves the same coefficients, up to the step's error; the window's do change."""
    fast, slow = signal(1500), signal(3000)
    assert relative_error(project(slow, "legs", 24)[-1], project(fast, "legs", 24)[-1]) < 0.01
    assert relative_error(project(slow, "legt", 24, span=800)[-1], project(fast, "legt", 24, span=800)[-1]) > 0.3


def test_windows_reconstruct_the_recent_past() -> None:
    u = signal(3000)
    ages = (torch.arange(0, 500, dtype=F64) + 0.5) / 500
    recent = u.flip(0)[:500]
    assert relative_error(reconstruct(project(u, "legt", 24, span=500)[-1], "legt", ages), recent) < 0.02
    faded = reconstruct(project(u, "lagt", 48, span=100)[-1], "lagt", ages * 5)
    assert relative_error(faded[:200], recent[:200]) < 0.05


def test_projection_is_online_and_differentiable() -> None:
    u = signal(40).requires_grad_()
    whole = project(u, "legs", 6)
    torch.testing.assert_close(whole[:25], project(u[:25], "legs", 6))
    assert torch.autograd.gradcheck(lambda x: project(x, "legt", 4, span=9.0), signal(8).requires_grad_())
    both = project(torch.stack([u, -u]), "lagt", 6, span=9.0)
    torch.testing.assert_close(both[0], -both[1])


def random_stable(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=F64)
    return A - (torch.linalg.eigvals(A).real.max() + 0.3) * torch.eye(n, dtype=F64), torch.ones(n, dtype=F64)


@pytest.mark.parametrize("method", ["euler", "backward_euler", "bilinear", "zoh", 0.3])
def test_dense_equals_diagonal(method: str | float) -> None:
    A, B = random_stable(5)
    values, vectors = torch.linalg.eig(A)
    dt = torch.tensor([0.1, 0.7], dtype=F64)
    dense, dense_B = discretize(A.expand(2, 5, 5), B.expand(2, 5), dt, method)
    rotated = torch.linalg.solve(vectors, B.to(vectors.dtype)).expand(2, 5)
    diagonal, diagonal_B = discretize(values.expand(2, 5), rotated, dt, method)
    back = vectors @ torch.diag_embed(diagonal) @ torch.linalg.inv(vectors)
    torch.testing.assert_close(back.real, dense)
    torch.testing.assert_close((vectors @ diagonal_B.unsqueeze(-1)).squeeze(-1).real, dense_B)


def test_methods_as_the_papers_write_them() -> None:
    A, B = random_stable(4)
    identity, dt = torch.eye(4, dtype=F64), 0.2
    inverse = torch.linalg.inv
    expected = {
        "euler": (identity + dt * A, dt * B),
        "backward_euler": (inverse(identity - dt * A), dt * inverse(identity - dt * A) @ B),
        "bilinear": (
            inverse(identity - dt / 2 * A) @ (identity + dt / 2 * A),
            dt * inverse(identity - dt / 2 * A) @ B,
        ),
        "zoh": (torch.matrix_exp(dt * A), inverse(A) @ (torch.matrix_exp(dt * A) - identity) @ B),
    }
    for method, truth in expected.items():
        torch.testing.assert_close(discretize(A, B, dt, method), truth)


def test_orders_of_convergence() -> None:
    """The error of many small steps falls with dt for the Euler forms, with dt^2 for the bilinear one."""
    A, B = random_stable(4)
    truth = torch.matrix_exp(A)

    def error(method: str, steps: int) -> float:
        return float((torch.linalg.matrix_power(discretize(A, B, 1 / steps, method)[0], steps) - truth).norm())

    for method, order in {"euler": 1, "backward_euler": 1, "bilinear": 2}.items():
        assert math.log2(error(method, 2000) / error(method, 4000)) == pytest.approx(order, abs=0.05)


def test_small_steps_keep_their_digits() -> None:
    A, B = torch.full((1,), -1e-9), torch.ones(1)
    torch.testing.assert_close(discretize(A, B, 1e-3, "zoh")[1], torch.tensor([1e-3]), rtol=1e-6, atol=0)


def test_gradients_of_discretize() -> None:
    A, B = random_stable(3)
    dt = torch.tensor(0.3, dtype=F64)
    for method in ("bilinear", "zoh"):
        inputs = [x.clone().requires_grad_() for x in (A, B, dt)]
        assert torch.autograd.gradcheck(lambda a, b, t: discretize(a, b, t, method), inputs)  # noqa: B023  # used at once


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo_matrices("leg", 4), "unknown measure: 'leg'; did you mean 'leg"),
        (lambda: hippo_matrices("legs", 0), "state_size must be at least 1, got 0"),
        (lambda: dplr("legs", 5), "state_size must be even, got 5"),
        (lambda: project(torch.ones(3), "legt", 4), "takes a span above 0"),
        (lambda: project(torch.ones(3), "legs", 4, span=2.0), "takes no span"),
        (lambda: discretize(torch.ones(3), torch.ones(3), 0.1, "exact"), "unknown discretization: 'exact'"),
        (lambda: discretize(torch.ones(3), torch.ones(3), 0.1, 1.5), "must be 0 to 1, got 1.5"),
        (lambda: discretize(torch.ones(3, 2), torch.ones(3), 0.1), r"for B \[3\], got \[3, 2\]"),
    ],
)
def test_mistakes_are_one_line(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
