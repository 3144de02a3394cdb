"""The first place that is not finite is found: a parameter, an output, a gradient."""

import pytest
import torch
from torch import Tensor, nn

from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.training.non_finite import first_non_finite


class Poison(torch.autograd.Function):
    """The identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("inf")


class Poisoned(nn.Module):
    """A layer whose output, or whose input's gradient, is spoilt."""

    def __init__(self, inner: nn.Module, output: bool) -> None:
        super().__init__()
        self.inner, self.output = inner, output

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * float("nan") if self.output else self.inner(Poison.apply(x))


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 4))


def find(model: nn.Module) -> str | None:
    return first_non_finite(model, lambda: model(torch.ones(2, 4)).square().sum())


def test_finite_everywhere():
    assert find(chain(nn.Linear(4, 4))) is None


def test_output():
    assert find(chain(Poisoned(nn.Linear(4, 4), output=True))) == "the output of 1"


def test_innermost_output_comes_first():
    model = chain(nn.Sequential(nn.ReLU(), Poisoned(nn.Linear(4, 4), output=True)))
    assert find(model) == "the output of 1.1"


def test_gradient():
    assert find(chain(Poisoned(nn.Linear(4, 4), output=False))) == "the gradient at the output of 0"


def test_gradient_of_a_parameter():
    model = chain()
    model[1].weight.register_hook(lambda gradient: gradient / 0)
    assert find(model) == "the gradient of 1.weight"


def test_parameter():
    model = chain()
    with torch.no_grad():
        model[1].bias[2] = float("inf")
    assert find(model) == "the parameter 1.bias"


def test_loss_itself():
    model = chain()
    assert first_non_finite(model, lambda: model(torch.ones(1, 4)).sum() / 0) == "the loss"


@pytest.mark.parametrize("place", ["layers.0.mixer.out_proj", "layers.1.feed_forward.experts"])
def test_hooks_are_gone_afterwards_and_language_models_are_searched(hybrid: ModelConfig, place: str):
    model = build(hybrid)
    module = model.backbone.get_submodule(place)
    handle = module.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    ids = torch.arange(20)[None]

    def loss() -> Tensor:
        return model(ids, labels=ids).loss

    assert first_non_finite(model, loss) == f"the output of backbone.{place}"
    handle.remove()
    assert first_non_finite(model, loss) is None
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
