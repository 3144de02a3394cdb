"""The training loop: batches in, updates of the model, and at their times rows of metrics, evaluations, checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.optim import AdamW

from statespan.errors import NonFiniteLoss
from statespan.layers.routing import RouterMetrics
from statespan.models.language_model import LanguageModel
from statespan.training.captured import Captured
from statespan.training.config import TrainingConfig
from statespan.training.metrics import Row, Totals, router_row
from statespan.training.non_finite import first_non_finite
from statespan.training.optimizer import set_learning_rate
from statespan.training.packing import Batch, DataPosition, PackedRows
from statespan.training.recompute import recomputing
from statespan.training.resume import RunState
from statespan.training.schedule import learning_rate_factor, progress

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Trainer:
    """A model in training: what an update needs, and how far the run is.

    One update is `step`; `run` makes updates until the run is over or it is asked to stop.
    """

    config: TrainingConfig
    model: LanguageModel
    optimizer: AdamW
    rows: PackedRows
    state: RunState = field(default_factory=RunState)

    @property
    def progress(self) -> float:
        """Share of the run done; 1 or more: over."""
        return self._progress(self.state.step, self.state.seconds)

    def _progress(self, step: int, seconds: float) -> float:
        return progress(step, seconds, self.config.run.max_steps, self.config.run.max_seconds)

    def run(
        self,
        *,
        on_metrics: Callable[[Row], object],
        on_evaluation: Callable[[], object],
        on_checkpoint: Callable[[], object],
        should_stop: Callable[[], bool],
    ) -> None:
        """Update until the run is over, calling back every `log_every`, `every_steps` and `save_every` steps."""
        run, evaluation = self.config.run, self.config.evaluation
        self.model.train()
        while self.progress < 1 and not should_stop():
            row, router = self.step()
            if self.state.step % run.log_every == 0 or self.progress >= 1:
                on_metrics(self._metrics(row, router))
            if self.progress >= 1:
                break
            if evaluation.every_steps and self.state.step % evaluation.every_steps == 0:
                on_evaluation()
            if run.save_every and self.state.step % run.save_every == 0:
                on_checkpoint()

    def step(self) -> tuple[Row, tuple[RouterMetrics, ...]]:
        """One update from the next batch: learning rate and gradient norm, and the routers' metrics of its last part.

        The batch's loss is its mean over predicted tokens, whatever the parts it is computed in: a part's mean loss
        counts by its predicted tokens. The auxiliary losses count evenly.

        Raises NonFiniteLoss, before the parameters are changed.
        """
        started, parts, position = time.perf_counter(), list[Batch](), self.state.position
        num_rows = self.config.run.batch_size // self.config.run.accumulation_steps
        for _ in range(self.config.run.accumulation_steps):
            part, position = self.rows.batch(position, num_rows)
            parts.append(part)
        found, router = self._accumulate(parts)
        norm = self._gradient_norm()  # before the wait for the losses, which the device would idle after
        self._add_losses(found, len(parts))
        gradient_norm = self._clip(norm, parts)
        seconds = self.state.seconds + time.perf_counter() - started
        factor = learning_rate_factor(self._progress(self.state.step + 1, seconds), self.config.schedule)
        learning_rate = factor * self.config.optimizer.learning_rate
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._count(parts, position, time.perf_counter() - started)
        return {"learning_rate": learning_rate, "gradient_norm": gradient_norm}, router

    def _count(self, parts: list[Batch], position: DataPosition, seconds: float) -> None:
        """One update is made."""
        num_tokens, totals = sum(part.input_ids.numel() for part in parts), self.state.totals
        totals.num_steps += 1
        totals.num_tokens += num_tokens
        totals.seconds += seconds
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            seconds=self.state.seconds + seconds,
            num_tokens=self.state.num_tokens + num_tokens,
            position=position,
        )

    def _accumulate(self, parts: list[Batch]) -> tuple[list[tuple[Batch, Tensor]], tuple[RouterMetrics, ...]]:
        """Gradients of the whole batch's loss, part by part; loss and auxiliary loss [2] of those that predict."""
        found, router = list[tuple[Batch, Tensor]](), ()
        num_predicted = max(sum(part.num_predicted for part in parts), 1)
        for part in parts:
            if part.num_predicted == 0:  # documents of one token only: a mean over nothing
                continue
            share = torch.tensor(part.num_predicted / num_predicted)
            loss, aux_loss, router = self._gradients(*self._inputs(part), share.to(self.model.device))
            found.append((part, torch.stack([loss, aux_loss.to(loss.dtype)])))
        return found, router

    def _add_losses(self, found: list[tuple[Batch, Tensor]], num_parts: int) -> None:
        """Wait for the device, and add what `_accumulate` found to the totals."""
        totals = self.state.totals
        for part, losses in found:
            nats, aux = losses.tolist()
            if not math.isfinite(nats + aux):
                raise self._non_finite("the loss", [part])
            totals.nats += nats * part.num_predicted
            totals.aux_loss += aux / num_parts
            totals.num_predicted += part.num_predicted
            totals.num_bytes += part.num_bytes

    @cached_property
    def _gradients(self) -> Callable[..., tuple[Tensor, Tensor, tuple[RouterMetrics, ...]]]:
        """(input_ids, segments, share) -> loss, aux_loss, router, and the gradients added to the parameters'."""
        return Captured(self.model, self._forward_backward) if self.config.run.cuda_graph else self._forward_backward

    def _forward_backward(
        self, input_ids: Tensor, segments: Tensor | None, share: Tensor
    ) -> tuple[Tensor, Tensor, tuple[RouterMetrics, ...]]:
        loss, aux_loss, router = self._forward(input_ids, segments)
        (loss * share + aux_loss / self.config.run.accumulation_steps).backward()
        return loss.detach(), aux_loss.detach(), router

    def _inputs(self, part: Batch) -> tuple[Tensor, Tensor | None]:
        device = self.model.device
        return part.input_ids.to(device), None if part.segments is None else part.segments.to(device)

    def _forward(self, input_ids: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, tuple[RouterMetrics, ...]]:
        run, precision = self.config.run, PRECISIONS[self.config.run.precision]
        autocast = torch.autocast(self.model.device.type, precision, enabled=precision != torch.float32)
        shares = (run.recompute_projections, run.recompute_convolutions, run.recompute_casts)
        with autocast, recomputing(self.model.layers, run.activation_checkpointing, *shares):
            output = self.model(input_ids, segments=segments, labels=input_ids)
        assert output.loss is not None  # labels were given
        return output.loss, output.aux_loss, output.router

    def _gradient_norm(self) -> Tensor:
        """The norm of all gradients together, on the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clip(self, norm: Tensor, parts: list[Batch]) -> float:
        """Clip the gradient, whose global norm this is, and return the norm."""
        found, limit = norm.item(), self.config.optimizer.clip_norm
        if not math.isfinite(found):
            raise self._non_finite("the gradient", parts)
        if limit is not None and found > limit:  # PyTorch's pass over all gradients would multiply others by 1
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return found

    def _non_finite(self, what: str, parts: list[Batch]) -> NonFiniteLoss:
        """Run the batch again under watch and say where it went wrong."""

        def again(part: Batch) -> Tensor:
            loss, aux_loss, _ = self._forward(*self._inputs(part))
            return loss + aux_loss

        self.optimizer.zero_grad()
        places = (first_non_finite(self.model, lambda part=part: again(part)) for part in parts)
        place = next(filter(None, places), "a sum of gradients that are finite one by one")
        return NonFiniteLoss(
            f"{what} of step {self.state.step + 1} is not finite; first seen in {place}. "
            "Try a lower optimizer.learning_rate or run.precision=float32"
        )

    def _metrics(self, row: Row, router: tuple[RouterMetrics, ...]) -> Row:
        """The row for metrics.jsonl; starts new totals."""
        layers = [i for i, spec in enumerate(self.model.config.layers) if spec.feed_forward == "moe"]
        place: Row = {
            "step": self.state.step,
            "epoch": self.state.position.epoch,
            "seconds": self.state.seconds,
            "tokens": self.state.num_tokens,
        }
        full = place | self.state.totals.row() | row | (router_row(router, layers) if router else {})
        self.state = replace(self.state, totals=Totals())
        return full
