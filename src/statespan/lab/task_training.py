"""Train a small model on a synthetic task: batches by seed, the product's optimizer, schedule and captured steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from statespan.errors import NonFiniteLoss, UserError
from statespan.evaluation import TaskBatch
from statespan.lab.experiment import Changes, Progress, Setting, settings_by_change
from statespan.models.language_model import LanguageModel
from statespan.ops import linear_cross_entropy
from statespan.training import OptimizerConfig, ScheduleConfig
from statespan.training.optimizer import build_optimizer
from statespan.training.schedule import learning_rate_factor
from statespan.training.trainer import PRECISIONS
from statespan.training.updates import CapturedUpdates, Loss, Updates

STEPS_AT_ONCE, TOKENS_AT_ONCE = 64, 2**21  # drawn on a GPU in one go, at most
LTI_LEARNING_RATE = 1e-3  # at most, of A, B and dt in the layers of the S4 family, as published
ON_HOST = ("s4", "lssl")  # mixers that make their systems on the host: no graph

ON_GPU: Changes = {"device": "cuda", "seeds": 3}
ON_CPU: Changes = {"time": "60 s of 2 cores", "device": "cpu", "seeds": 1, "precision": "float32"}
TINY: Changes = {"time": "a second", "hidden_size": 16, "batch_size": 2, "look_every": 2}

OnLook = Callable[[int, float], bool]


@dataclass(frozen=True)
class TaskPlan:
    """How a model is trained on a task."""

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.0
    final_ratio: float = 1.0  # last learning rate / peak, by a cosine; 1: constant
    weight_decay: float = 0.0
    clip_norm: float | None = None
    beta2: float = 0.95  # of AdamW: of the mean of squared gradients
    precision: torch.dtype = torch.float32  # bfloat16: autocast
    look_every: int = 100  # steps between looks at the loss

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")

    def learning_rates(self) -> list[float]:
        """Of every step."""
        schedule = ScheduleConfig("cosine", self.warmup_fraction, final_ratio=self.final_ratio)
        shares = ((step + 1) / self.steps for step in range(self.steps))
        return [self.learning_rate * learning_rate_factor(share, schedule) for share in shares]


@dataclass(frozen=True, kw_only=True)
class TaskSetting(Setting):
    """How the models of a synthetic task are trained; each experiment adds the sizes of its task."""

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    final_ratio: float = 0.05  # last learning rate / peak, by a cosine; 1: constant
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    beta2: float = 0.95  # of AdamW
    precision: str = "float32"
    look_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        self.plan()

    def plan(self) -> TaskPlan:
        """Steps and learning rates."""
        return TaskPlan(
            self.steps,
            self.learning_rate,
            warmup_fraction=self.warmup_fraction,
            final_ratio=self.final_ratio,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            beta2=self.beta2,
            precision=PRECISIONS[self.precision],
            look_every=self.look_every,
        )


T = TypeVar("T", bound=TaskSetting)


def task_settings(kind: type[T], h100: Changes, cpu: Changes, tiny: Changes) -> dict[str, T]:
    """An experiment's settings by what each changes of those that the synthetic tasks share."""
    return settings_by_change(kind, ON_GPU | h100, ON_CPU | cpu, TINY | tiny)


def train_in_looks(
    model: LanguageModel,
    loss: Loss,
    draw: Callable[[int, int], tuple[Tensor, ...]],
    plan: TaskPlan,
    progress: Progress,
    on_look: OnLook = lambda step, loss: False,
) -> int:
    """Train `model` by `plan` and return the number of steps made.

    On a GPU each step is one CUDA graph, and the host waits for the device at looks only.

    Args:
        model: trained in place.
        loss: (*inputs of a step) -> the loss; see `Updates`.
        draw: (step, count) -> the inputs, [k ..] each, of the k steps from `step` on, 1 to `count` of them.
        plan: steps, learning rate.
        progress: called at looks.
        on_look: called at looks with the steps made and the mean loss since the last look; True ends the training.
    Raises:
        NonFiniteLoss: the loss is no number.
    """
    lti = min(plan.learning_rate, LTI_LEARNING_RATE)
    config = OptimizerConfig(
        learning_rate=plan.learning_rate,
        lti_learning_rate=lti,
        weight_decay=plan.weight_decay,
        betas=(0.9, plan.beta2),
    )
    captured = model.device.type == "cuda" and all(spec.mixer not in ON_HOST for spec in model.config.layers)
    make = CapturedUpdates if captured else Updates
    updates = make(model, build_optimizer(model, config), loss, plan.learning_rates(), plan.clip_norm)
    losses: list[Tensor] = []
    done = 0
    model.train()
    while done < plan.steps:
        look = min(plan.steps, done - done % plan.look_every + plan.look_every)
        losses.append(updates(*draw(done, min(STEPS_AT_ONCE, look - done) if captured else 1)))
        done += len(losses[-1])
        if done < look:
            continue
        mean = torch.cat(losses).mean().item()
        losses.clear()
        if not math.isfinite(mean):
            raise NonFiniteLoss(f"the loss is not finite at step {done}; try a lower learning rate")
        progress(done / plan.steps, f"step {done}  loss {mean:.3f}")
        if on_look(done, mean):
            break
        model.train()
    return done


def train_on_task(
    model: LanguageModel,
    draw: Callable[[int, int], TaskBatch],
    plan: TaskPlan,
    progress: Progress,
    on_look: OnLook = lambda step, loss: False,
) -> int:
    """Train `model` on batches of a task: `train_in_looks` with `task_loss`.

    Args:
        model: trained in place.
        draw: (step, count) -> the rows of the steps from `step` on: of `count` steps, or of fewer where the next ones'
            rows are of another kind. On a CPU each step draws its own.
        plan: steps, learning rate, precision.
        progress: called at looks.
        on_look: as for `train_in_looks`.
    """
    rows, length = draw(0, 1).input_ids.shape
    most = max(1, TOKENS_AT_ONCE // (rows * length))

    def inputs(step: int, count: int) -> tuple[Tensor, ...]:
        batch = draw(step, min(count, most)).to(model.device)
        return tuple(value.unflatten(0, (-1, rows)) for value in (batch.input_ids, *batch.asked()))

    return train_in_looks(model, task_loss(model, plan.precision), inputs, plan, progress, on_look)


def task_loss(
    model: LanguageModel, precision: torch.dtype = torch.float32
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(input_ids [b t], places [b n], answers [b n]) -> the mean loss of what is asked; see `TaskBatch.asked`.

    The head sees only the places where something is asked: with a large vocabulary it would be most of the work.
    """

    def loss(input_ids: Tensor, places: Tensor, answers: Tensor) -> Tensor:
        with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
            hidden, _, _, _ = model.backbone(model.embedding(input_ids).to(model.stream_dtype), None, None)
            asked = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            head, size = model.head_weight, model.config.vocab_size
            return linear_cross_entropy(model.normed(asked), head, answers, valid_vocab_size=size)

    return loss
