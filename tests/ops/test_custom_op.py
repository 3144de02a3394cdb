"""Gradients taken inside a kernel, and calls that go past the dispatcher."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statespan.ops import rms_norm
from statespan.ops.custom_op import define, gradients

CALLS: list[bool] = []  # of the kernel below: whether gradients were on


def _kernel(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    CALLS.append(torch.is_grad_enabled())
    return x**power * weight, x.detach() + 1


def _setup(ctx, inputs, output) -> None:
    x, weight, ctx.power = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return grad * weight * ctx.power * x ** (ctx.power - 1), (grad * x**ctx.power).sum(), None


powers = define(
    "test_powers(Tensor x, Tensor weight, int power) -> (Tensor, Tensor)",
    _kernel,
    lambda x, weight, power: (x.new_empty(x.shape), x.new_empty(x.shape)),
    setup_context=_setup,
    backward=_backward,
)


class Seen(TorchDispatchMode):
    """The names of the ops that the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Tensor, torch.nn.Parameter])
def test_a_call_past_the_dispatcher_records_as_the_op_does(kind) -> None:
    x, weight = torch.randn(5, requires_grad=True), torch.randn(())
    weight = torch.nn.Parameter(weight) if kind is torch.nn.Parameter else weight.requires_grad_()
    CALLS.clear()
    direct, other = powers(x, weight, 3)
    assert not other.requires_grad and CALLS == [False]
    through = torch.ops.statespan.test_powers(x, weight, 3)[0]
    assert torch.equal(direct, through) and "GeneratedBackward" not in direct.grad_fn.name()
    upstream = torch.randn(5)
    for found, wanted in zip(
        torch.autograd.grad(direct, (x, weight), upstream),
        torch.autograd.grad(through, (x, weight), upstream),
        strict=True,
    ):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        assert powers(x, weight, 3)[0].grad_fn is None
    assert powers(x.detach(), weight.detach(), 3)[0].grad_fn is None


def test_modes_and_transforms_see_the_op() -> None:
    x, weight = torch.randn(5, requires_grad=True), torch.randn((), requires_grad=True)
    with Seen() as seen:
        powers(x, weight, 2)
    assert seen.names == ["statespan::test_powers"]
    found = torch.compile(lambda x: powers(x, weight, 2)[0].sum(), fullgraph=True, backend="eager")(x)
    assert torch.equal(found, powers(x, weight, 2)[0].sum())
    with torch.utils.checkpoint.set_checkpoint_debug_enabled(False):
        again = torch.utils.checkpoint.checkpoint(lambda x: powers(x, weight, 2)[0], x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], torch.autograd.grad(powers(x, weight, 2)[0].sum(), x)[0])


def test_gradients_are_those_of_autograd_and_none_where_an_input_is_none() -> None:
    x, y = torch.randn(3), torch.randn(3)
    found = gradients(lambda a, missing, b: (a * b, a.exp()), (x, None, y), (torch.ones(3), torch.full((3,), 2.0)))
    torch.testing.assert_close(found[0], y + 2 * x.exp())
    assert found[1] is None
    torch.testing.assert_close(found[2], x)


def test_an_output_that_depends_on_no_input_adds_nothing() -> None:
    x = torch.randn(3)
    found = gradients(lambda a: (a * 2, torch.ones(4)), (x,), (torch.ones(3), torch.ones(4)))
    torch.testing.assert_close(found[0], torch.full((3,), 2.0))


def test_gradients_are_zero_where_no_output_depends_on_an_input() -> None:
    def constant(a: Tensor, missing: None, b: Tensor) -> tuple[Tensor]:
        return (torch.ones(4),)

    a, missing, b = gradients(constant, (torch.randn(2, 3), None, torch.randn(5)), (torch.ones(4),))
    assert missing is None
    assert torch.equal(a, torch.zeros(2, 3)) and torch.equal(b, torch.zeros(5))
    assert gradients(lambda missing: (torch.ones(4),), (None,), (torch.ones(4),)) == (None,)


def test_a_second_derivative_is_an_error_and_not_zero() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(rms_norm(x, torch.ones(8), eps=1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
