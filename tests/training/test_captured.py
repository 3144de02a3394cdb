"""Updates by replayed CUDA graphs are those of the same steps taken one by one."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from statespan.checkpoints import ByteTokenizer
from statespan.errors import UserError
from statespan.models.build import build
from statespan.models.layer_pattern import LayerSpec
from statespan.training import TrainingConfig, captured
from statespan.training.captured import WARM_UPS, Captured
from statespan.training.data import load_data
from statespan.training.optimizer import build_optimizer
from statespan.training.packing import PackedRows
from statespan.training.trainer import Trainer

GPUS = ["cuda"] if torch.cuda.is_available() else []
Make = Callable[[nn.Module, Callable[..., Any]], Captured]


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: what runs inside is undone at the end and runs again, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self._before.append((args[0], args[0].clone()))
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self._calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.copy_(value)

    def pool(self) -> None:
        return None

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                result.copy_(again)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a Captured of a module on the CPU."""

    @contextmanager
    def capture(tape: Tape, pool: Any) -> Generator[None]:
        with tape:
            yield
        tape.undo()

    def make(module: nn.Module, compute: Callable[..., Any]) -> Captured:
        found = Captured(nn.Module(), compute)
        found._parameters = list(module.parameters())
        return found

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(captured, "warming_up", nullcontext)
    monkeypatch.setattr(captured, "capture", capture)
    return make


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.cuda_graph needs the model on a CUDA device"):
        Captured(nn.Linear(2, 2), print)


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("recompute", [False, True])
def test_updates_equal_those_without_graphs(config: TrainingConfig, device: str, recompute: bool) -> None:
    """Packed and plain batches, in two parts each: every row of metrics and every weight."""
    layers = (LayerSpec("mamba1"), LayerSpec("mamba2", "mlp"), LayerSpec("attention", "mlp"))
    config = replace(config, model=replace(config.model, hidden_size=64, layers=layers))
    config = config.override(["run.accumulation_steps=2", f"run.activation_checkpointing={str(recompute).lower()}"])
    trained = []
    for graph in (False, True):
        corpus, _ = load_data(config.data, ByteTokenizer())
        model = build(config.model, device=device)
        rows = PackedRows(corpus, config.data.sequence_length, config.data.seed)
        changed = config.override([f"run.cuda_graph={str(graph).lower()}"])
        trainer = Trainer(changed, model, build_optimizer(model, config.optimizer), rows)
        found = [trainer.step()[0] for _ in range(6)]
        trained.append((found, trainer.state.totals.nats, [p.detach().clone() for p in model.parameters()]))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["emulated", *GPUS])
def make(request: pytest.FixtureRequest) -> Make:
    """Captured, of modules that it may move to a GPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return lambda module, compute: Captured(module.to(request.param), compute)


def test_gradients_are_new_or_added_as_without_graphs(make: Make) -> None:
    """Two kinds of input in turns, each new, added to a graph's own gradients, and to gradients from elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    bystander = nn.Linear(2, 2)
    captured = make(nn.ModuleList([model, bystander]), lambda x: model(x).square().sum().backward())
    for sizes in ([4], [4, 4], [6], [6, 4, 6], [-1, 4], [-1, 6, 6], [4]):
        model.zero_grad()
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for size in sizes:
            if size < 0:  # from elsewhere
                for parameter, total in zip(model.parameters(), expected, strict=True):
                    parameter.grad = torch.randn_like(parameter)
                    total += parameter.grad
                continue
            x = torch.randn(size, 5).to(expected[0].device)
            captured(x)
            found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            expected = [total + gradient for total, gradient in zip(expected, found, strict=True)]
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
        assert all(p.grad is None for p in bystander.parameters())


@pytest.mark.parametrize(
    "sizes", [[4, 6, 6], [4, 4, 6, 4, 6], [6, 4, 6, 6], [6, 6, 4, 4]], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_gradients_that_only_some_calls_have_are_added_too(make: Make, sizes: list[int]) -> None:
    """One part of the model sees rows of 6 alone; its gradients come first where others already are."""
    torch.manual_seed(0)
    model, other = nn.Linear(5, 3), nn.Linear(5, 3)
    weights = [*model.parameters(), *other.parameters()]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (model(x) + other(x) if len(x) == 6 else model(x)).square().sum()

    captured = make(nn.ModuleList([model, other]), lambda x: loss(x).backward())
    for _ in range(2):
        for weight in weights:
            weight.grad = None
        expected = [torch.zeros_like(weight) for weight in weights]
        for size in sizes:
            x = torch.randn(size, 5).to(weights[0].device)
            captured(x)
            found = torch.autograd.grad(loss(x), weights, materialize_grads=True, allow_unused=True)
            expected = [total + gradient for total, gradient in zip(expected, found, strict=True)]
        torch.testing.assert_close([weight.grad for weight in weights], expected)


@pytest.mark.parametrize("fails_at", range(1, WARM_UPS + 2))
@pytest.mark.parametrize("new", [False, True])
def test_a_capture_that_fails_leaves_the_gradients(emulated: Make, new: bool, fails_at: int) -> None:
    """Whether it is a warm-up or the capture, they stay what they were, and the next call is right."""
    model, calls = nn.Linear(5, 3), list[int]()
    weights = list(model.parameters())

    def compute(x: torch.Tensor) -> None:
        calls.append(1)
        model(x).square().sum().backward()
        if len(calls) == fails_at:
            raise MemoryError

    captured, x = emulated(model, compute), torch.randn(4, 5)
    before = [None if new else torch.randn_like(weight) for weight in weights]
    for weight, gradient in zip(weights, before, strict=True):
        weight.grad = gradient
    kept = [None if gradient is None else gradient.clone() for gradient in before]
    with pytest.raises(MemoryError):
        captured(x)
    assert all(weight.grad is gradient for weight, gradient in zip(weights, before, strict=True))
    if not new and fails_at <= WARM_UPS:  # a capture runs nothing, an emulated one that fails is not undone
        torch.testing.assert_close(before, kept)
    model.zero_grad()
    found = torch.autograd.grad(model(x).square().sum(), weights)
    for times in (1, 2):
        captured(x)
        torch.testing.assert_close([weight.grad for weight in weights], [times * gradient for gradient in found])
