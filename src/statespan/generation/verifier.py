"""Verifier: one forward over short rows of tokens; on a GPU a CUDA graph that keeps the state after each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from statespan.generation.idle import Idle
from statespan.generation.steps import Steps, feed
from statespan.layers.kv_cache import KVCache
from statespan.layers.state import ModelState, State
from statespan.models import verify_step
from statespan.models.language_model import LanguageModel
from statespan.models.slabs import Slabs, states_in
from statespan.models.verify_step import VerifyDecoder

KEPT = 4  # of a model, that wait for the next call


class Verification(Protocol):
    """What a forward gave. All of it is overwritten by the next one, but the states that went in by value."""

    @property
    def logits(self) -> Tensor:
        """[n v] at the places that count, row after row."""
        ...

    def commit(self, true: Sequence[int]) -> tuple[ModelState, list[int]]:
        """The state to go on from where so many tokens of each row came true, and how many of these it has absorbed."""
        ...

    def state_after(self, row: int, ids: Sequence[int]) -> ModelState:
        """The state of one row after some of the tokens that it was fed, from the first on."""
        ...


class Verifier:
    """Forwards of one batch size.

    Args:
        model: it is not kept.
        batch_size: b.
        num_tokens: of a row, at most: the newest one and all drafts.
    """

    def __init__(self, model: LanguageModel, batch_size: int, num_tokens: int) -> None:
        captures = verify_step.on_device(model.device)
        self._graph = _Graph.of(model, batch_size, num_tokens) if captures else None

    @property
    def has_graphs(self) -> bool:
        return self._graph is not None

    @property
    def settled(self) -> bool:
        """Whether a forward has nothing left to compile or to capture."""
        return self._graph is None or self._graph.num_runs > 1

    def __call__(
        self, model: LanguageModel, rows: Sequence[Sequence[int]], wanted: Sequence[int], state: ModelState
    ) -> Verification:
        """Feed b rows of unequal length from `state`; logits are wanted after the last `wanted[i]` tokens of row i."""
        if self._graph is not None:
            return self._graph(rows, wanted, state)
        logits, after = feed(model, rows, state)
        ends = torch.cat([row[row.shape[0] - count :] for row, count in zip(logits, wanted, strict=True)])
        return _Fed(ends, model, rows, state, after, logits.shape[1])


@dataclass(frozen=True)
class _Fed:
    """A forward that gave the state after the last tokens alone: rows go on from there or stay where they were."""

    logits: Tensor
    model: LanguageModel
    rows: Sequence[Sequence[int]]
    before: ModelState
    after: ModelState
    num_tokens: int  # of a row, padding included

    def commit(self, true: Sequence[int]) -> tuple[ModelState, list[int]]:
        whole = [count == len(row) for count, row in zip(true, self.rows, strict=True)]
        absorbed = [count if taken else 0 for count, taken in zip(true, whole, strict=True)]
        return commit(self.before, self.after, whole, self.num_tokens), absorbed

    def state_after(self, row: int, ids: Sequence[int]) -> ModelState:
        state = self.before.select(torch.tensor([row]))
        return feed(self.model, [ids], state)[1] if ids else state


class _Graph:
    """Equally long rows over memory of its own; what fills a row up is never committed."""

    def __init__(
        self, decoder: VerifyDecoder, memory: Slabs, kept: Slabs, before: ModelState, after: ModelState
    ) -> None:
        self._decoder, self._memory, self._kept, self._before, self._after = decoder, memory, kept, before, after
        self._ids = ids = torch.zeros(kept.num_rows, dtype=torch.int64, device=memory.device)
        self._run = decoder.captured(lambda: decoder(ids))
        self.logits = torch.empty(0)
        self.num_runs = 0

    @classmethod
    def of(cls, model: LanguageModel, batch_size: int, num_tokens: int) -> "_Graph | None":
        """None where the model's layers have no such steps."""
        layers = model.new_state(0).layers
        if any(isinstance(layer, KVCache) for layer in layers):
            return None
        constants = [{} if layer is None else layer.tensors() for layer in layers]
        memory, kept = (Slabs(constants, size, model.device) for size in (batch_size, batch_size * num_tokens))
        before, after = states_in(memory, layers), states_in(kept, layers)
        active = torch.ones(batch_size, dtype=torch.int32, device=model.device)
        decoder = model.verify_decoder(batch_size, num_tokens, memory=before, kept=after, active=active)
        return None if decoder is None else cls(decoder, memory, kept, before, after)

    def __call__(self, rows: Sequence[Sequence[int]], wanted: Sequence[int], state: ModelState) -> "_Graph":
        size = self._kept.num_rows // self._memory.num_rows
        self.num_runs += 1
        self._ids.copy_(torch.tensor(self._decoder.filled(rows)).pin_memory(), non_blocking=True)
        if state is not self._before:
            torch._foreach_copy_(_tensors(self._before), _tensors(state))  # type: ignore[reportPrivateImportUsage]  # one launch; its only name
        logits = self._run().unflatten(0, (-1, size))
        ends = zip(logits, rows, wanted, strict=True)
        self.logits = torch.cat([row[len(fed) - count : len(fed)] for row, fed, count in ends])
        return self

    def commit(self, true: Sequence[int]) -> tuple[ModelState, list[int]]:
        sources = [self._decoder.kept_after(row, count) for row, count in enumerate(true)]
        self._memory.take_rows(range(len(true)), self._kept, sources)
        return self._before, list(true)

    def state_after(self, row: int, ids: Sequence[int]) -> ModelState:
        return self._after.select(torch.tensor([self._decoder.kept_after(row, len(ids))]))


@dataclass(frozen=True, eq=False)
class Forwards:
    """The two ways of one batch to go on."""

    verify: Verifier
    step: Steps


_idle: Idle[Forwards] = Idle(KEPT)


def take(model: LanguageModel, batch_size: int, num_tokens: int) -> Forwards:
    """Forwards for `batch_size` rows, until `give_back`; graphs that an earlier call captured are used again."""

    def make() -> Forwards:
        return Forwards(Verifier(model, batch_size, num_tokens), Steps(model, batch_size))

    return _idle.take(model, (batch_size, num_tokens), make)


def give_back(model: LanguageModel | None, forwards: Forwards) -> None:
    """Keep forwards that were taken for the next call, where they have graphs."""
    if forwards.verify.has_graphs:
        _idle.give_back(model, forwards)


def commit(before: ModelState, after: ModelState, taken: Sequence[bool], num_new: int) -> ModelState:
    """The state of a batch whose rows go on from `after` where they are taken, and from `before` elsewhere.

    Args:
        before: of b rows. Its caches may have been appended to since; these slots are hidden from rows not taken.
        after: what a forward of `num_new` tokens a row (padding included) made of it. Not to be used any more.
        taken: one a row.
    """
    if all(taken):
        return after
    if not any(taken):
        return before
    device = next(tensor.device for layer in after.layers if layer is not None for tensor in layer.tensors().values())
    rows = torch.tensor(taken, device=device)
    pairs = zip(before.layers, after.layers, strict=True)
    return ModelState(
        tuple(None if old is None or new is None else _mixed(old, new, rows, num_new) for old, new in pairs)
    )


def _mixed(before: State, after: State, taken: Tensor, num_new: int) -> State:
    if isinstance(before, KVCache) and isinstance(after, KVCache):
        after.position[:, after.length - num_new : after.length].masked_fill_(~taken.unsqueeze(1), -1)
        counts = torch.where(taken, after.next_position, before.next_position)
        conv = None if after.conv is None or before.conv is None else _rows(taken, after.conv, before.conv)
        return replace(after, next_position=counts, conv=conv, dense=False)
    old = before.tensors()
    return replace(after, **{name: _rows(taken, new, old[name]) for name, new in after.tensors().items()})  # type: ignore[type-var]  # every State is a dataclass


def _rows(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(taken.view(-1, *[1] * (new.dim() - 1)), new, old)


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers if layer is not None for tensor in layer.tensors().values()]
