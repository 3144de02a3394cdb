"""Zero-order hold where A vanishes: (exp(dt A) - 1) / A has the limit dt, and a slope."""

import pytest
import torch
from torch import Tensor

from statespan.ops import selective_scan, selective_state_update, ssd
from statespan.ops.state_update.reference import discretize

RATES = [0.0, -1e-30, -1e-9, -1e-4, -1e-2, -0.0199, -0.0201, -0.3, -4.0, -80.0]
SERIES = 40  # terms; the last one matters nowhere for |dt A| <= 4


def by_series(dt: Tensor, A: Tensor) -> Tensor:
    """dt sum_k (dt A)^k / (k + 1)!, which knows no division by A."""
    term, total = dt, dt
    for k in range(2, SERIES):
        term = term * dt * A / k
        total = total + term
    return total


def test_values_and_gradients_for_every_size_of_A() -> None:
    dt = torch.tensor(0.05, dtype=torch.float64).expand(len(RATES)).clone().requires_grad_()
    A = torch.tensor(RATES, dtype=torch.float64, requires_grad=True)
    exact = by_series(dt, A)
    exact_slopes = torch.autograd.grad(exact.sum(), (dt, A))
    _, scale = discretize(dt, A, "zoh")
    slopes = torch.autograd.grad(scale.sum(), (dt, A))
    torch.testing.assert_close(scale, exact, rtol=1e-14, atol=0)
    torch.testing.assert_close(slopes, exact_slopes, rtol=1e-10, atol=0)
    assert slopes[1][0] == pytest.approx(0.05**2 / 2)


def test_float32_is_exact_in_values_and_gradients() -> None:
    dt = torch.tensor(0.05).expand(len(RATES)).clone().requires_grad_()
    A = torch.tensor(RATES, requires_grad=True)
    slopes = torch.autograd.grad(discretize(dt, A, "zoh")[1].sum(), (dt, A))
    wide = [value.detach().double().requires_grad_() for value in (dt, A)]
    exact_slopes = torch.autograd.grad(by_series(*wide).sum(), wide)
    for slope, exact in zip(slopes, exact_slopes, strict=True):
        torch.testing.assert_close(slope.double(), exact, rtol=2e-5, atol=0)


def small_problem(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"u": (2, 5, 4), "dt": (2, 5, 4), "A": (4, 3), "B": (2, 5, 1, 3), "C": (2, 5, 1, 3)}
    named = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    named["A"] = -named["A"].abs()
    named["A"][0, 0] = named["A"][2] = 0.0
    return {name: value.to(dtype).requires_grad_() for name, value in named.items()}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scan_and_its_gradients_where_A_is_zero(backend: str) -> None:
    truth, found = small_problem(torch.float64), small_problem(torch.float32)
    exact = selective_scan(**truth, discretization="zoh", backend="reference")
    y = selective_scan(**found, discretization="zoh", backend=backend)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    slopes = torch.autograd.grad(y.square().sum(), list(found.values()))
    for slope, want in zip(slopes, torch.autograd.grad(exact.square().sum(), list(truth.values())), strict=True):
        torch.testing.assert_close(slope.double(), want, rtol=1e-4, atol=1e-4)


def test_reference_scan_has_the_slopes_of_finite_differences_where_A_is_zero() -> None:
    truth = small_problem(torch.float64)

    def scan(*values: Tensor) -> Tensor:
        return selective_scan(*values, discretization="zoh", backend="reference")

    assert torch.autograd.gradcheck(scan, tuple(truth.values()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_ssd_and_its_gradients_where_A_is_zero(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (1, 5, 2, 3), "dt": (1, 5, 2), "A": (2,), "B": (1, 5, 1, 3), "C": (1, 5, 1, 3)}
    named = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    named["A"] = torch.tensor([0.0, -1.0], dtype=torch.float64)

    def run(*values: Tensor) -> Tensor:
        return ssd(*values, discretization="zoh", backend=backend)

    assert torch.autograd.gradcheck(run, tuple(value.requires_grad_() for value in named.values()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_token_where_A_is_zero(backend: str) -> None:
    whole = {name: value.detach() for name, value in small_problem(torch.float32).items()}
    exact = selective_scan(**whole, discretization="zoh", backend="reference")
    state = torch.zeros(2, 4, 3)
    for t in range(5):
        parts = (whole[name][:, t] for name in ("u", "dt", "B", "C"))
        u, dt, B, C = parts
        y, state = selective_state_update(state, u, dt, whole["A"], B, C, discretization="zoh", backend=backend)
        torch.testing.assert_close(y, exact[:, t], rtol=1e-5, atol=1e-6)
