"""The gradient of a matrix that is embedding and head at once is the sum of both uses' own."""

import pytest
import torch
from torch.nn import functional as F

from statespan.ops import linear_cross_entropy
from statespan.ops.tied_embedding import tied_embedding

GPUS = ["cuda"] if torch.cuda.is_available() else []
KINDS = {"random": (50, 40), "one token": (1, 300), "more tokens than rows": (7, 1000), "single": (50, 1)}


def both(ids: torch.Tensor, weight: torch.Tensor, tied: bool) -> torch.Tensor:
    """A loss of the head of what tokens' rows become."""
    rows, head = tied_embedding(ids, weight) if tied else (F.embedding(ids, weight), weight)
    return linear_cross_entropy(torch.tanh(rows), head, ids.roll(1), reduction="sum")


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_both_uses(device: str, dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    most, count = KINDS[kind]
    ids = torch.randint(0, most, (2, count), device=device)
    weight = torch.randn(60, 520, device=device).mul_(0.1).to(dtype).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    both(ids, exact, False).backward()
    for repetition in (1, 2):  # the second time it is added to what is there
        loss = both(ids, weight, True)
        loss.backward(retain_graph=True)
        limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
        error = (weight.grad.double() - repetition * exact.grad).norm() / (repetition * exact.grad).norm()
        assert error < limit
    (again,) = torch.autograd.grad(loss, weight)
    error = (again.double() - exact.grad).norm() / exact.grad.norm()
    assert error < limit
    plain = weight.detach().requires_grad_()
    both(ids, plain, False).backward()
    assert error <= 1.5 * (plain.grad.double() - exact.grad).norm() / exact.grad.norm() + 1e-6


@pytest.mark.parametrize("device", GPUS)
def test_either_use_alone(device: str) -> None:
    ids, weight = torch.tensor([[3, 1, 3]], device=device), torch.randn(5, 4, device=device, requires_grad=True)
    rows, head = tied_embedding(ids, weight)
    (found,) = torch.autograd.grad(rows.sum(), weight, retain_graph=True)
    assert found.sum(1).tolist() == [0, 4, 0, 8, 0]
    (found,) = torch.autograd.grad(head.square().sum(), weight)
    torch.testing.assert_close(found, 2 * weight)


@pytest.mark.parametrize("device", ["cpu", *GPUS])
def test_without_gradients_it_is_the_plain_embedding(device: str) -> None:
    ids, weight = torch.tensor([[3, 1, 3]], device=device), torch.randn(5, 4, device=device)
    rows, head = tied_embedding(ids, weight)
    assert head is weight
    assert torch.equal(rows, weight[ids])


@pytest.mark.parametrize("device", GPUS)
def test_gradients_repeat_to_the_bit(device: str) -> None:
    ids = torch.randint(0, 9, (4, 2048), device=device)
    weight = torch.randn(50, 1000, device=device, requires_grad=True)
    found = [torch.autograd.grad(both(ids, weight, True), weight)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
