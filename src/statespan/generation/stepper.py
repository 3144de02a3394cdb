"""Stepper: feed the newest token of each row, choose the next; on a GPU a CUDA graph, kept for the next call."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from statespan.generation.idle import Idle
from statespan.generation.sampling import BLOCK, Sampling, choose, random_numbers
from statespan.layers.state import ModelState
from statespan.models.capture import weakly
from statespan.models.language_model import LanguageModel
from statespan.ops.decode_step.tokens import choose_best

KEPT = 4  # steppers of a model that wait for the next call; each holds a graph and the state of its rows

Outcome = Callable[[], tuple[list[int], list[float]]]


class Stepper:
    """Steps for batches of one size and one way of sampling, on memory of its own.

    `start` sets it to a state and the logits that follow from it, `advance` feeds the tokens just chosen; both choose
    the next ones, and `outcome` hands them over when they are there.
    """

    def __init__(self, model: LanguageModel, batch_size: int, sampling: Sampling) -> None:
        self.batch_size, self.sampling = batch_size, sampling
        self.decoder = model.decoder(batch_size)
        device, vocab_size = model.device, model.config.vocab_size
        # The addresses of all of these are in the graph.
        self._chosen = torch.zeros(12 * batch_size, dtype=torch.uint8, device=device)  # in one piece, for one copy
        self.ids, self.best = _parts(self._chosen)  # the tokens, and the largest logits
        self.history = sampling.history((batch_size, vocab_size), device)
        draws_on = "cpu" if device.type == "mps" else device  # which knows no float64
        self._numbers = torch.zeros(0 if sampling.greedy else BLOCK, batch_size, dtype=torch.float64, device=draws_on)
        self._place = torch.zeros(1, dtype=torch.int64, device=draws_on)  # of the next row of numbers
        self._left = 0  # rows of numbers that are not used up
        self.generators: list[torch.Generator] = []
        self.logits = torch.empty(0)
        self._run = self.decoder.captured(weakly(self._feed))

    def start(
        self,
        logits: Tensor,
        state: ModelState,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator],
        room: int,
    ) -> None:
        """Go on from `state` and `logits` [b v], with room for so many tokens more; chooses the first ones."""
        self.decoder.start(state, room)
        self.generators, self._left = list(generators), 0
        if self.history is not None:
            self.history.begin(prompts)
        self._refill()
        self.logits = self._choose(logits)

    def take_over(self, other: "Stepper", rows: Sequence[int], room: int) -> None:
        """Go on with these rows of another stepper, whose tokens are chosen."""
        index = torch.tensor(rows, device=self.ids.device)
        self.decoder.start(other.decoder.state().select(index), room)
        self.generators = [other.generators[row] for row in rows]
        for ours, theirs in ((self.ids, other.ids), (self.best, other.best)):
            ours.copy_(theirs[index])
        if self.history is not None and other.history is not None:
            self.history.copy_(other.history.rows(index))
        self.logits = other.logits[index]
        self._numbers.copy_(other._numbers[:, index.to(self._numbers.device)])
        self._place.copy_(other._place)
        self._left = other._left

    def advance(self) -> None:
        """Feed the chosen tokens and choose the next; on a GPU this only tells it to."""
        self._refill()
        self.logits = self._run()

    def outcome(self) -> Outcome:
        """A function that waits for the tokens chosen last, and gives them and the largest logits."""
        if self.ids.device.type != "cuda":
            ids, best = self.ids.tolist(), self.best.tolist()
            return lambda: (ids, best)
        # What is chosen next must not overwrite them before they are read.
        copy = torch.empty(len(self._chosen), dtype=torch.uint8, pin_memory=True)
        copy.copy_(self._chosen, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> tuple[list[int], list[float]]:
            copied.synchronize()
            ids, best = _parts(copy)
            return ids.tolist(), best.tolist()

        return wait

    def _feed(self) -> Tensor:
        return self._choose(self.decoder(self.ids))

    def _choose(self, logits: Tensor) -> Tensor:
        """The logits as float32, after the tokens chosen from them are in their places."""
        logits = logits.float()
        if self.sampling.greedy:
            choose_best(self.sampling.penalize(logits, self.history), self.ids, self.best)
        else:
            numbers = self._numbers.index_select(0, self._place).squeeze(0)
            self._place.add_(1)
            ids, best = choose(logits, self.sampling, numbers, self.history)
            self.ids.copy_(ids)
            self.best.copy_(best)
        if self.history is not None:
            self.history.add(self.ids)
        return logits

    def _refill(self) -> None:
        """Send numbers when the last are used up, in the order in which one by one they would be drawn."""
        if self.sampling.greedy:
            return
        if self._left == 0:
            block = random_numbers(self.generators, BLOCK)
            on_gpu = self._numbers.is_cuda
            self._numbers.copy_(block.pin_memory() if on_gpu else block, non_blocking=on_gpu)
            self._place.zero_()
            self._left = BLOCK
        self._left -= 1


def _parts(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """int64 and float32 numbers of each row, in 12 bytes a row."""
    end = len(chosen) // 12 * 8
    return chosen[:end].view(torch.int64), chosen[end:].view(torch.float32)


_idle: Idle[Stepper] = Idle(KEPT)


def take(model: LanguageModel, batch_size: int, sampling: Sampling) -> Stepper:
    """A stepper, until `give_back`; a graph that an earlier call captured is used again."""
    sampling = Sampling(**{f.name: getattr(sampling, f.name) for f in fields(Sampling)})
    return _idle.take(model, (batch_size, sampling), lambda: Stepper(model, batch_size, sampling))


def give_back(model: LanguageModel | None, stepper: Stepper) -> None:
    """Keep a stepper that was taken for the next call, where it has a graph."""
    if stepper.decoder.captures:
        _idle.give_back(model, stepper)
