"""Train a small model on a synthetic task: batches by seed, the product's optimizer, schedule and captured steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import NonFiniteLoss, UserError
from statespan.evaluation import TaskBatch
from statespan.lab.experiment import Progress
from statespan.models.language_model import LanguageModel
from statespan.training import OptimizerConfig, ScheduleConfig
from statespan.training.captured import Captured
from statespan.training.optimizer import build_optimizer, set_learning_rate
from statespan.training.schedule import learning_rate_factor

CAPTURED_MIXERS = ("mamba1", "mamba2", "attention", "s4d", None)  # S4 and LSSL make their systems on the host


@dataclass(frozen=True)
class TaskPlan:
    """How a model is trained on a task."""

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.0
    final_ratio: float = 1.0  # last learning rate / peak, by a cosine; 1: constant
    weight_decay: float = 0.0
    clip_norm: float | None = None
    precision: torch.dtype = torch.float32  # bfloat16: autocast
    look_every: int = 100  # steps between looks at the loss

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")


def train_on_task(
    model: LanguageModel,
    draw: Callable[[int], TaskBatch],
    plan: TaskPlan,
    progress: Progress,
    on_look: Callable[[int, float], bool] = lambda step, loss: False,
) -> int:
    """Train `model` on `draw(0)`, `draw(1)`, .. and return the number of steps made.

    On a GPU forward and backward are captured once and replayed; the host waits for the device at looks only.

    Args:
        model: trained in place.
        draw: the batch of a step.
        plan: steps, learning rate, precision.
        progress: called at looks.
        on_look: called at looks with the steps made and the mean loss since the last look; True ends the training.
    Raises:
        NonFiniteLoss: the loss is no number.
    """
    optimizer = build_optimizer(model, OptimizerConfig(plan.learning_rate, plan.weight_decay))
    schedule = ScheduleConfig("cosine", plan.warmup_fraction, final_ratio=plan.final_ratio)
    gradients, captured = _gradients(model, plan.precision)
    losses: list[Tensor] = []
    model.train()
    for step in range(1, plan.steps + 1):
        batch = draw(step - 1).to(model.device)
        losses.append(gradients(batch.input_ids, batch.labels).clone())
        if plan.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip_norm)
        set_learning_rate(optimizer, plan.learning_rate * learning_rate_factor(step / plan.steps, schedule))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not captured)
        if step % plan.look_every == 0 or step == plan.steps:
            loss = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is not finite at step {step}; try a lower learning rate")
            progress(step / plan.steps, f"step {step}  loss {loss:.3f}")
            if on_look(step, loss):
                return step
            model.train()
    return plan.steps


def _gradients(model: LanguageModel, precision: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], bool]:
    """(input_ids, labels) -> loss, with gradients added to the parameters'; and whether it is captured."""

    def compute(input_ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
            output = model(input_ids, labels=labels)
        assert output.loss is not None  # labels were given
        (output.loss + output.aux_loss).backward()
        return output.loss.detach()

    captured = model.device.type == "cuda" and all(spec.mixer in CAPTURED_MIXERS for spec in model.config.layers)
    return (Captured(model, compute) if captured else compute), captured
