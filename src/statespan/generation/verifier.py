"""Verifier: one forward over short rows of tokens; on a GPU a CUDA graph, where the model's states have one size."""

import gc
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from statespan.generation.drafters import Steps, feed
from statespan.layers.state import ModelState, SSMState
from statespan.models.language_model import LanguageModel

KEPT = 4  # of a model, that wait for the next call
SIZES = (4, 8, 16, 32)  # tokens a row for which there is a graph; shorter rows are padded


@dataclass(frozen=True)
class Verification:
    """What a forward gave. All of it is overwritten by the next one, but the states that went in by value."""

    logits: Tensor  # [b t v], rows end together
    before: ModelState  # the state that it started from
    after: ModelState
    num_tokens: int  # t, padding included


class Verifier:
    """Forwards of one batch size. The first of each number of tokens runs as it is, for what is compiled then.

    Args:
        model: it is not kept.
        batch_size: b.
        captures: whether a CUDA graph can hold a step of the model.
    """

    def __init__(self, model: LanguageModel, batch_size: int, captures: bool) -> None:
        self._batch_size = batch_size
        layers = model.new_state(0).layers
        self._captures = captures and all(layer is None or isinstance(layer, SSMState) for layer in layers)
        self._graphs: dict[int, _Graph | None] = {}

    @property
    def has_graphs(self) -> bool:
        return any(graph is not None for graph in self._graphs.values())

    def __call__(self, model: LanguageModel, rows: Sequence[Sequence[int]], state: ModelState) -> Verification:
        """Feed b rows of unequal length from `state`."""
        longest = max(map(len, rows))
        size = next((size for size in SIZES if size >= longest), None)
        if not self._captures or size is None:
            logits, after = feed(model, rows, state)
            return Verification(logits, state, after, longest)
        if size not in self._graphs:
            self._graphs[size] = None
            logits, after = feed(model, rows, state, size)
            return Verification(logits, state, after, size)
        graph = self._graphs[size] or _Graph(model, self._batch_size, size)
        self._graphs[size] = graph
        return graph(rows, state)


@contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Generator[None, None, None]:
    """What is launched inside becomes the graph."""
    gc_was_enabled = gc.isenabled()
    gc.disable()  # an old graph that is collected now would end the capture
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            yield
    finally:
        if gc_was_enabled:
            gc.enable()


class _Graph:
    """A forward of `size` tokens a row over tensors that stay where they are."""

    def __init__(self, model: LanguageModel, batch_size: int, size: int) -> None:
        self._size = size
        self._ids = torch.zeros(batch_size, size, dtype=torch.int64, device=model.device)
        self._segments = torch.zeros(batch_size, size, dtype=torch.int32, device=model.device)
        self._before = model.new_state(batch_size)
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph):
            output = model(self._ids, segments=self._segments, state=self._before)
        assert output.logits is not None and output.state is not None  # a state went in
        self._result = Verification(output.logits, self._before, output.state, size)

    def __call__(self, rows: Sequence[Sequence[int]], state: ModelState) -> Verification:
        padding = [self._size - len(row) for row in rows]
        ids = torch.tensor([[0] * count + list(row) for count, row in zip(padding, rows, strict=True)])
        segments = torch.where(torch.arange(self._size) < torch.tensor(padding)[:, None], -1, 0)
        self._ids.copy_(ids.pin_memory(), non_blocking=True)
        self._segments.copy_(segments.int().pin_memory(), non_blocking=True)
        if state is not self._before:
            torch._foreach_copy_(_tensors(self._before), _tensors(state))  # type: ignore[reportPrivateImportUsage]  # one launch; its only name
        self._graph.replay()
        return self._result


@dataclass(frozen=True)
class Forwards:
    """The two ways of one batch to go on. Their graphs are kept for the next call, as in generation/stepper.py."""

    key: tuple[int, ...]  # batch size and the weights' addresses, which the graphs hold
    verify: Verifier
    step: Steps


_idle: WeakKeyDictionary[LanguageModel, list[Forwards]] = WeakKeyDictionary()


def take(model: LanguageModel, batch_size: int) -> Forwards:
    """Forwards for `batch_size` rows, until `give_back`."""
    key = (batch_size, *(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())))
    for forwards in _idle.get(model, []):
        if forwards.key == key:
            _idle[model].remove(forwards)
            return forwards
    step = Steps(model, batch_size)
    return Forwards(key, Verifier(model, batch_size, step.captures), step)


def give_back(model: LanguageModel | None, forwards: Forwards) -> None:
    """Keep forwards that were taken, where they have graphs."""
    if model is not None and forwards.verify.has_graphs:
        idle = _idle.setdefault(model, [])
        idle.append(forwards)
        del idle[:-KEPT]


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers if layer is not None for tensor in layer.tensors().values()]
