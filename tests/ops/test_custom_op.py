"""Gradients taken inside a kernel."""

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients


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
