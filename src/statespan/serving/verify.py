"""Verify: one forward over several tokens of each of a pool's first rows, which commits nothing by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statespan.generation.verifier import capture
from statespan.layers.state import ModelState, SSMState
from statespan.models.language_model import LanguageModel
from statespan.serving.runner import Runner
from statespan.serving.state_pool import StatePool, bucket
from statespan.serving.transfer import to_device

SIZES = (8, 16, 32)  # tokens a row for which there is a graph; shorter rows are padded


class Verified(Protocol):
    """What a forward gave; the next one overwrites it."""

    @property
    def logits(self) -> Tensor:
        """[n t v] float32 at the last places; rows end together."""
        ...

    def commit(self, rows: Sequence[int], added: Sequence[int]) -> None:
        """These rows go on from here, each by so many tokens; the others stay where they are."""
        ...


class Verify:
    """Forwards of the first rows of a runner's pool, from where these are.

    On a GPU they are CUDA graphs where the model's states have one size; elsewhere, and with attention, whose keys
    grow, they are launched kernel by kernel.

    Args:
        runner: of the model and its pool.
        num_logits: logits are wanted at the last so many places.
    """

    def __init__(self, runner: Runner, num_logits: int) -> None:
        self._model, self._pool, self._num_logits = runner.model, runner.pool, num_logits
        layers = self._model.new_state(0).layers
        constant = all(layer is None or isinstance(layer, SSMState) for layer in layers)
        self._captures = constant and self._model.device.type == "cuda"
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @torch.inference_mode()
    def __call__(self, fed: Sequence[Sequence[int]]) -> Verified:
        """Feed row i the tokens `fed[i]`."""
        longest = max(map(len, fed))
        size = next((size for size in SIZES if size >= longest), None)
        fresh = not all(self._pool.num_tokens[: len(fed)])  # whose memory is not zero yet
        if size is None or fresh or not self._captures:
            return self._launch(fed, longest)
        key = bucket(len(fed)), size
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._model, self._pool, *key, self._num_logits)
        return self._graphs[key](fed)

    def _launch(self, fed: Sequence[Sequence[int]], longest: int) -> Verified:
        model = self._model
        ids, padding = _padded(fed, longest)
        segments = None
        if any(len(row) < longest for row in fed):
            segments = to_device(padding, torch.int64, model.device)
        hidden = model.embedding(to_device(ids, torch.int64, model.device)).to(model.stream_dtype)
        hidden, after, _, _ = model.backbone(hidden, self._pool.state(range(len(fed))), segments)
        assert after is not None  # a state went in
        return _Launched(model.head(hidden[:, -self._num_logits :]).float(), after, self._pool)


@dataclass(frozen=True)
class _Launched:
    logits: Tensor
    after: ModelState
    pool: StatePool

    @torch.inference_mode()
    def commit(self, rows: Sequence[int], added: Sequence[int]) -> None:
        if rows:
            all_rows = len(rows) == len(self.logits)
            self.pool.store(rows, self.after if all_rows else self.after.select(torch.tensor(rows)), added)


class _Graph:
    """A forward of `size` tokens a row over the pool's own memory, and another graph that commits."""

    def __init__(self, model: LanguageModel, pool: StatePool, num_rows: int, size: int, num_logits: int) -> None:
        self._pool, self._shape = pool, (num_rows, size)
        self._ids = torch.zeros(num_rows, size, dtype=torch.int64, device=model.device)
        self._segments = torch.full_like(self._ids, -1)
        self._taken = torch.zeros(num_rows, dtype=torch.bool, device=model.device)
        before = pool.leading(num_rows)

        def forward() -> tuple[Tensor, ModelState]:
            hidden = model.embedding(self._ids).to(model.stream_dtype)
            hidden, after, _, _ = model.backbone(hidden, before, self._segments)
            assert after is not None  # a state went in
            return model.head(hidden[:, -num_logits:]).float(), after

        forward()  # compiles what is compiled when it first runs
        self._forward, self._commit = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capture(self._forward):
            self.logits, after = forward()
        with capture(self._commit):
            for ours, new in zip(_tensors(before), _tensors(after), strict=True):
                torch.where(self._taken.view(-1, *[1] * (new.dim() - 1)), new, ours, out=ours)

    def __call__(self, fed: Sequence[Sequence[int]]) -> "_Graph":
        num_rows, size = self._shape
        ids, padding = _padded([*fed, *[()] * (num_rows - len(fed))], size)
        self._ids.copy_(to_device(ids, torch.int64, self._ids.device))
        self._segments.copy_(to_device(padding, torch.int64, self._ids.device))
        self._forward.replay()
        return self

    @torch.inference_mode()
    def commit(self, rows: Sequence[int], added: Sequence[int]) -> None:
        taken = set(rows)
        self._taken.copy_(to_device([row in taken for row in range(self._shape[0])], torch.bool, self._ids.device))
        self._commit.replay()
        if rows:
            self._pool.grow(rows, added)


def _padded(rows: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Ids and segments [n length] of rows padded on the left."""
    padding = length - torch.tensor([len(row) for row in rows])
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    return ids, torch.where(torch.arange(length) < padding[:, None], -1, 0)


def _tensors(state: ModelState) -> list[Tensor]:
    return [tensor for layer in state.layers if layer is not None for tensor in layer.tensors().values()]
