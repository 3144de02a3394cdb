"""Linear time-invariant systems: recurrence, convolution and continuous time agree; segments, states, gradients."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.lti import (
    DplrSystem,
    System,
    causal_convolution,
    discretize,
    dplr,
    hippo_matrices,
    lti_scan,
    reference,
)

F64 = torch.float64
LENGTHS = [1, 2, 63, 257]
KINDS = ["real", "complex", "dense", "dplr"]


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    scale = max(1.0, truth.detach().abs().max().item())
    torch.testing.assert_close(found, truth, atol=tolerance * scale, rtol=0)


def system(kind: str, channels: int = 3, states: int = 4) -> System | DplrSystem:
    """A random stable system whose states last from a step to some hundred."""
    if kind == "dplr":
        return s4(channels, 2 * states)
    dtype = torch.complex128 if kind == "complex" else F64
    B, C = torch.randn(2, channels, states, dtype=dtype)
    if kind == "dense":
        orthogonal = torch.linalg.qr(torch.randn(channels, states, states, dtype=F64)).Q
        return System(orthogonal * torch.linspace(0.5, 0.99, channels, dtype=F64).view(-1, 1, 1), B, C)
    radius = torch.linspace(0.3, 0.99, channels * states, dtype=F64).view(channels, states)
    A = torch.polar(radius, torch.rand_like(radius) * 3) if kind == "complex" else radius
    return System(A, B, C)


def parameters(model: System | DplrSystem) -> list[Tensor]:
    return [getattr(model, field.name) for field in fields(model)]


def s4(channels: int = 3, states: int = 16, rank_two: bool = False, dtype: torch.dtype = F64) -> DplrSystem:
    form = dplr("legt" if rank_two else "legs", states)
    eigenvalues, B = form.eigenvalues.expand(channels, -1), form.B.expand(channels, -1)
    P = form.P.unsqueeze(1).expand(-1, channels, -1)
    C = torch.randn(channels, states // 2, dtype=torch.complex128)
    dt = torch.logspace(-3, -1, channels, dtype=F64)
    complex_dtype = torch.complex64 if dtype == torch.float32 else torch.complex128
    return DplrSystem(*(x.to(complex_dtype) for x in (eigenvalues, P, B, C)), dt.to(dtype))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_convolution_equals_recurrence(kind: str, length: int) -> None:
    model, u = system(kind), torch.randn(2, length, 3, dtype=F64)
    start = torch.randn(2, 3, 4, dtype=model.B.dtype)
    for state in (None, start):
        y, final = lti_scan(u, model, initial_state=state, return_final_state=True)
        truth, last = reference.lti_scan(u, model, initial_state=state)
        close(y, truth)
        close(final, last)
        close(lti_scan(u, model, initial_state=state), truth)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_kernel_is_the_powers(kind: str) -> None:
    model = system(kind)
    x, out = model.B, []
    for _ in range(50):
        out.append((model.C * x).sum(-1))
        x = (model.A @ x.unsqueeze(-1)).squeeze(-1) if kind == "dense" else model.A * x
    truth = torch.stack(out, dim=1)
    close(model.kernel(50), 2 * truth.real if kind == "complex" else truth)


@pytest.mark.parametrize("kind", ["complex", "dense"])
def test_pairs_are_a_real_system(kind: str) -> None:
    """x' = A x + B u solved by the matrix exponential of the real matrix, the continuous view, at 1024 steps."""
    n, length = 64, 1024
    A, B = hippo_matrices("lagt", n)
    if kind == "complex":  # a normal matrix: -1/2 + skew, whose eigenvectors are orthonormal
        form = dplr("legs", n)
        A = 2 * (form.V @ torch.diag(form.eigenvalues) @ form.V.mH).real
        rotated = (form.V.mH @ B.to(form.V.dtype)).unsqueeze(0)
        C = torch.randn(1, n, dtype=F64)
        model = System(*discretize(form.eigenvalues.unsqueeze(0), rotated, 0.01), C.to(form.V.dtype) @ form.V)
    else:
        C = torch.randn(1, n, dtype=F64)
        model = System(*discretize(A.unsqueeze(0), B.unsqueeze(0), 0.01), C)
    u = torch.randn(1, length, 1, dtype=F64)
    step, pulse = torch.matrix_exp(0.01 * A), torch.linalg.solve(A, torch.matrix_exp(0.01 * A) @ B - B)
    state, out = torch.zeros(n, dtype=F64), []
    for value in u[0, :, 0]:
        state = step @ state + pulse * value
        out.append(C[0] @ state)
    truth = torch.stack(out).view(1, -1, 1)
    close(reference.lti_scan(u, model)[0], truth)
    close(lti_scan(u, model), truth)


@pytest.mark.parametrize("rank_two", [False, True])
@pytest.mark.parametrize("length", [1, 2, 37, 256])
def test_cauchy_kernel_equals_powers(length: int, rank_two: bool) -> None:
    model = s4(states=64, rank_two=rank_two)
    dense = model.dense()
    x, out = dense.B, []
    for _ in range(length):
        out.append((dense.C * x).sum(-1))
        x = (dense.A @ x.unsqueeze(-1)).squeeze(-1)
    close(model.kernel(length), torch.stack(out, dim=1))


def test_dplr_is_the_bilinear_hippo_system() -> None:
    """S4 against C Abar^k Bbar of the LegS matrix itself."""
    model, A_B = s4(states=32), hippo_matrices("legs", 32)
    V = dplr("legs", 32).V
    A, B = discretize(A_B[0].expand(3, 32, 32), A_B[1].expand(3, 32), model.dt, "bilinear")
    C = 2 * (model.C @ V.mH).real  # y = 2 Re(C V* x)
    close(model.kernel(100), System(A, B, C).kernel(100))


@pytest.mark.parametrize("rank_two", [False, True])
def test_dplr_step_equals_its_dense_form(rank_two: bool) -> None:
    model, u = s4(rank_two=rank_two), torch.randn(2, 30, 3, dtype=F64)
    y, last = reference.lti_scan(u, model)
    truth, dense_last = reference.lti_scan(u, model.dense())
    close(y, truth)
    close(torch.view_as_real(last).flatten(-2), dense_last)
    close(lti_scan(u, model), truth)


def test_float32_kernels() -> None:
    """Against float64 of the same parameters, relative to the largest tap."""
    single = s4(states=64, dtype=torch.float32)
    double = DplrSystem(
        *(x.to(torch.complex128) for x in (single.eigenvalues, single.P, single.B, single.C)), single.dt.double()
    )
    truth = double.kernel(1024)
    for found in (single.kernel(1024), single.dense().kernel(1024)):
        assert ((found - truth).abs().amax(1) / truth.abs().amax(1)).max() < 1e-4
    A, B = discretize(single.eigenvalues, single.B, single.dt)
    exact = System(*discretize(double.eigenvalues, double.B, double.dt), double.C).kernel(1024)
    found = System(A, B, single.C).kernel(1024)
    assert ((found - exact).abs().amax(1) / exact.abs().amax(1)).max() < 1e-4


SEGMENTS = {
    "packed": [[3] * 9 + [1] * 1 + [4] * 17, [5] * 27],
    "padded": [[-1] * 4 + [0] * 20 + [-1] * 3, [-1] * 27],
    "both": [[0, -1, 0, 1, 1, -1, -1, 1, 2] * 3, [-1] * 5 + [7] * 2 + [8] * 15 + [-2] * 5],
}


@pytest.mark.parametrize("stated", [False, True])
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_segments_equal_the_loop(kind: str, name: str, stated: bool) -> None:
    model, segments = system(kind), torch.tensor(SEGMENTS[name])
    u, D = torch.randn(2, 27, 3, dtype=F64).requires_grad_(), torch.randn(3, dtype=F64).requires_grad_()
    state = torch.randn(2, 3, 4, dtype=model.B.dtype).requires_grad_() if stated else None
    weight_y, weight_state = torch.randn(2, 27, 3, dtype=F64), torch.randn(2, 3, 4, dtype=model.B.dtype)
    leaves = [*(x.requires_grad_() for x in parameters(model)), u, D, *([] if state is None else [state])]
    results = []
    for scan in (
        lambda: lti_scan(u, model, D, initial_state=state, segments=segments, return_final_state=True),
        lambda: reference.lti_scan(u, model, D, state, segments),
    ):
        y, final = scan()
        loss = (y * weight_y).sum() + (final * weight_state).real.sum()
        results.append((y, final, *torch.autograd.grad(loss, leaves)))
    for found, truth in zip(*results, strict=True):
        close(found, truth)
    padding = segments < 0
    assert (results[0][0][padding] == 0).all()


def test_padding_may_hold_anything() -> None:
    model, u = system("complex"), torch.randn(1, 9, 3, dtype=F64)
    segments = torch.tensor([[0, 0, -1, 0, 0, -1, 1, 1, -1]])
    y, final = lti_scan(u, model, segments=segments, return_final_state=True)
    spoilt = u.masked_fill((segments < 0).unsqueeze(-1), float("nan"))
    again, same = lti_scan(spoilt, model, segments=segments, return_final_state=True)
    assert torch.equal(y, again) and torch.equal(final, same)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    model = system(kind, channels=2, states=3)
    u, state = torch.randn(2, 7, 2, dtype=F64), torch.randn(2, 2, 3, dtype=model.B.dtype)
    inputs = [x.clone().requires_grad_() for x in (u, state, *parameters(model))]

    def scan(u: Tensor, state: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
        return lti_scan(u, type(model)(*parts), initial_state=state, return_final_state=True)

    assert torch.autograd.gradcheck(scan, inputs)


def test_gradients_of_the_cauchy_kernel() -> None:
    model = s4(channels=2, states=6)
    inputs = [x.clone().requires_grad_() for x in (model.eigenvalues, model.P, model.B, model.C, model.dt)]
    assert torch.autograd.gradcheck(lambda *x: DplrSystem(*x).kernel(7), inputs)
    u, state = torch.randn(2, 2, dtype=F64), torch.randn(2, 2, 3, dtype=torch.complex128)
    assert torch.autograd.gradcheck(lambda *x: DplrSystem(*x).step(state, u), inputs)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 1), (5, 5), (63, 7), (64, 100), (257, 257)])
def test_causal_convolution(length: int, taps: int) -> None:
    u, kernel = torch.randn(2, 3, length, dtype=F64).transpose(1, 2), torch.randn(3, taps, dtype=F64)
    truth = torch.zeros(2, length, 3, dtype=F64)
    for t in range(length):
        for k in range(min(taps, t + 1)):
            truth[:, t] += kernel[:, k] * u[:, t - k]
    close(causal_convolution(u, kernel), truth)


def test_nothing_of_the_future() -> None:
    model, u = system("complex"), torch.randn(1, 50, 3, dtype=F64)
    changed = u.clone()
    changed[:, 30:] = 1e6
    close(lti_scan(changed, model)[:, :30], lti_scan(u, model)[:, :30], 1e-8)


def test_mistakes_are_one_line() -> None:
    model, u = system("real"), torch.randn(2, 5, 3, dtype=F64)
    for call, message in (
        (lambda: lti_scan(u[:, :0], model), "u has no time step"),
        (lambda: lti_scan(u[0], model), r"u must be \[b t d\]"),
        (lambda: lti_scan(u[..., :2], model), r"A must be \[d n\] or \[d n n\] with d = 2"),
        (lambda: lti_scan(u, replace(model, C=model.C[:, :2])), r"C must be \[d n\] = \[3, 4\], got \[3, 2\]"),
        (lambda: lti_scan(u, model, initial_state=torch.zeros(1, 3, 4)), r"initial_state must be \[b d n\]"),
        (lambda: lti_scan(u, model, segments=torch.zeros(2, 4)), r"segments must be \[b t\]"),
        (lambda: lti_scan(u, model, torch.zeros(4)), r"D must be \[d\] = \[3\], got \[4\]"),
        (lambda: lti_scan(u.to("meta"), model), "move them to one device"),
        (lambda: causal_convolution(u, torch.zeros(4, 5)), r"kernel must be \[d l\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
