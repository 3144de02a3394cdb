"""Updates by replayed CUDA graphs are those of the same steps taken one by one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from statespan.checkpoints import ByteTokenizer
from statespan.errors import UserError
from statespan.models.build import build
from statespan.models.layer_pattern import LayerSpec
from statespan.training import TrainingConfig
from statespan.training.captured import Captured
from statespan.training.data import load_data
from statespan.training.optimizer import build_optimizer
from statespan.training.packing import PackedRows
from statespan.training.trainer import Trainer

GPUS = ["cuda"] if torch.cuda.is_available() else []


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


@pytest.mark.parametrize("device", GPUS)
def test_gradients_are_new_or_added_as_without_graphs(device: str) -> None:
    """Two kinds of input in turns, each new, added to a graph's own gradients, and to gradients from elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(device)
    bystander = nn.Linear(2, 2).to(device)
    captured = Captured(nn.ModuleList([model, bystander]), lambda x: model(x).square().sum().backward())
    for sizes in ([4], [4, 4], [6], [6, 4, 6], [-1, 4], [-1, 6, 6], [4]):
        model.zero_grad()
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for size in sizes:
            if size < 0:  # from elsewhere
                for parameter, total in zip(model.parameters(), expected, strict=True):
                    parameter.grad = torch.randn_like(parameter)
                    total += parameter.grad
                continue
            x = torch.randn(size, 5, device=device)
            captured(x)
            found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            expected = [total + gradient for total, gradient in zip(expected, found, strict=True)]
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
        assert all(p.grad is None for p in bystander.parameters())
