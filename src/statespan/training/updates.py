"""Many updates of a small model at the least cost: on a GPU a whole one, optimizer included, is one CUDA graph.

The kernels of a tiny model are done before the host has started them. So nothing is left to the host but to bring the
batches of many updates at once, and to ask for the replays.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW

from statespan.models.language_model import LanguageModel
from statespan.training.captured import WARM_UPS, capture, preparing, warming_up
from statespan.training.optimizer import set_learning_rate

Loss = Callable[..., Tensor | tuple[Tensor, Tensor]]  # of one batch: the loss, or what is trained and what is told
AHEAD = 2  # calls that the host runs ahead of the GPU


class Updates:
    """Updates one after the other: loss, backward, clipping, AdamW with the next learning rate.

    `updates(*inputs)` takes tensors whose first dimension counts updates, [k ..] each, and makes k of them; it returns
    their losses [k] float32.

    Args:
        model: trained in place.
        optimizer: of its parameters.
        loss: (*inputs of one update) -> the loss, a scalar with gradients; or two, one to train and one to return.
        learning_rates: of all updates there will be, in order.
        clip_norm: limit of the gradient's global norm.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamW,
        loss: Loss,
        learning_rates: list[float],
        clip_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._loss, self._clip_norm = loss, clip_norm
        self._learning_rates, self._done = learning_rates, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        losses: list[Tensor] = []
        for batch in zip(*inputs, strict=True):
            set_learning_rate(self.optimizer, self._learning_rates[self._done])
            losses.append(self.update(*batch))
            self._done += 1
        return torch.stack(losses)

    def update(self, *batch: Tensor) -> Tensor:
        """One update with the optimizer's learning rate; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(*batch)
        trained, told = loss if isinstance(loss, tuple) else (loss, loss)
        trained.backward()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        self.optimizer.step()
        return told.detach().float()


@dataclass
class _Call:
    """A captured update: it reads batch number `index` of `inputs` and counts up."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # [most updates of a call ..]
    losses: Tensor  # [most]
    index: Tensor  # [1] int64


class CapturedUpdates(Updates):
    """The same, each kind of input (shapes and dtypes without k) captured once: an update costs the host one launch.

    Learning rates and counters lie on the device. `loss` must not wait for the GPU, and its control flow must not
    depend on values. Threads may each train a model of their own side by side, each on its own stream.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamW,
        loss: Loss,
        learning_rates: list[float],
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(model, optimizer, loss, learning_rates, clip_norm)
        # Warming up reads rates beyond the last update's.
        self._rates = torch.tensor([*learning_rates, *[0.0] * WARM_UPS], device=model.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=model.device)  # updates made
        for group in optimizer.param_groups:
            group["lr"], group["capturable"] = torch.zeros((), device=model.device), True
        self._calls: dict[object, _Call] = {}
        self._ends: deque[torch.cuda.Event] = deque()

    def __call__(self, *inputs: Tensor) -> Tensor:
        kind = tuple((value.shape[1:], value.dtype) for value in inputs)
        call = self._calls.get(kind)
        if call is None:
            call = self._calls[kind] = self._capture(inputs)
        if len(self._ends) == AHEAD:
            self._ends.popleft().synchronize()
        most, losses = len(call.losses), list[Tensor]()
        for parts in zip(*(value.split(most) for value in inputs), strict=True):
            count = len(parts[0])
            for place, part in zip(call.inputs, parts, strict=True):
                place[:count].copy_(part)
            call.index.zero_()
            for _ in range(count):
                call.graph.replay()
            losses.append(call.losses[:count].clone())
        end = torch.cuda.Event(blocking=True)
        end.record()
        self._ends.append(end)
        return torch.cat(losses)

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Call:
        graph = torch.cuda.CUDAGraph()
        losses = torch.zeros(len(inputs[0]), device=self.model.device)
        call = _Call(graph, tuple(map(torch.clone, inputs)), losses, torch.zeros_like(self._position))
        with preparing:
            self._warm_up(call)
            pool = next(iter(self._calls.values())).graph.pool() if self._calls else None
            with capture(graph, pool):
                self._step(call)
        return call

    def _step(self, call: _Call) -> None:
        set_learning_rate(self.optimizer, self._rates.index_select(0, self._position)[0])
        loss = self.update(*(value.index_select(0, call.index)[0] for value in call.inputs))
        call.losses.index_copy_(0, call.index, loss.reshape(1))
        call.index.add_(1)
        self._position.add_(1)

    def _warm_up(self, call: _Call) -> None:
        """Updates that leave no trace: kernels are compiled and chosen, and the optimizer has made its state."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        weights = [p.detach().clone() for p in parameters]
        states = [{k: v.clone() for k, v in self.optimizer.state.get(p, {}).items()} for p in parameters]
        position = self._position.clone()
        with warming_up():
            for _ in range(WARM_UPS):
                call.index.zero_()
                self._step(call)
        with torch.no_grad():
            for parameter, weight, state in zip(parameters, weights, states, strict=True):
                parameter.copy_(weight)
                for name, value in self.optimizer.state[parameter].items():
                    value.copy_(state[name]) if name in state else value.zero_()
        self._position.copy_(position)
        self.optimizer.zero_grad(set_to_none=True)
