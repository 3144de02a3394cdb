"""Verify: one forward over the newest token and the drafts of each of a pool's first rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statespan.layers.state import ModelState
from statespan.models import verify_step
from statespan.models.slabs import Slabs
from statespan.models.transfer import to_device
from statespan.models.verify_step import VerifyDecoder
from statespan.serving.pool_memory import bucket
from statespan.serving.runner import Runner
from statespan.serving.state_pool import StatePool

RUNS_TO_CAPTURE = 2  # of a graph: the first runs as it is


class Verified(Protocol):
    """What a forward gave; the next one overwrites it."""

    @property
    def logits(self) -> Tensor:
        """[m v] float32 at the places that count, row after row."""
        ...

    def commit(self, true: Mapping[int, int]) -> None:
        """Of the tokens that these rows were fed, so many came true: the rows go on behind them where they can.

        The others stay where they are, to be fed them again.
        """
        ...


class Verify:
    """Forwards of the first rows of a runner's pool, from where these are.

    On a GPU they are CUDA graphs of `num_tokens` a row that keep the state after each, where the model's layers have
    such steps. Elsewhere they are launched kernel by kernel, and a row goes on only where all of its tokens came true.

    Args:
        runner: of the model and its pool.
        num_tokens: of a row: the newest one and all drafts.
    """

    def __init__(self, runner: Runner, num_tokens: int) -> None:
        self._runner, self._num_tokens = runner, num_tokens
        self._graphs: dict[int, _Graph] = {}  # by rows; they share the memory for states
        self._kept: Slabs | None = None
        self._captures = verify_step.on_device(runner.model.device)

    @torch.inference_mode()
    def __call__(self, fed: Sequence[Sequence[int]], wanted: Sequence[int]) -> Verified:
        """Feed row i the tokens `fed[i]`; logits are wanted after the last `wanted[i]` of them."""
        pool = self._runner.pool
        for row, tokens in enumerate(fed) if pool.slides else ():
            pool.reserve(row, pool.num_tokens[row] + len(tokens))
        graph = self._graph(bucket(len(fed))) if self._captures else None
        return self._launch(fed, wanted) if graph is None else graph(fed, wanted)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all graphs now, while no row is in use."""
        for size in self._runner.graph_sizes if self._captures else ():
            if graph := self._graph(size):
                for _ in range(RUNS_TO_CAPTURE):
                    graph([[0]], [1])

    def settled(self, num_rows: int) -> bool:
        """Whether a forward of so many rows has nothing left to compile or to capture."""
        graph = self._graphs.get(bucket(num_rows))
        return not self._captures or (graph is not None and graph.num_runs >= RUNS_TO_CAPTURE)

    def _graph(self, num_rows: int) -> "_Graph | None":
        """The graph for so many rows; None: the model has none."""
        if num_rows not in self._graphs:
            runner, count = self._runner, num_rows * self._num_tokens
            if self._kept is None or self._kept.num_rows < count:
                self._graphs.clear()  # with the memory that they hold
                self._kept = None
                self._kept = runner.pool.slabs(count)
            decoder = runner.model.verify_decoder(
                num_rows,
                self._num_tokens,
                memory=runner.pool.leading(num_rows),
                kept=runner.pool.state_in(self._kept, count),
                active=runner.pool.active[:num_rows],
            )
            if decoder is None:
                self._captures, self._kept = False, None
                return None
            self._graphs[num_rows] = _Graph(runner, decoder, self._kept, self._num_tokens)
        return self._graphs[num_rows]

    def _launch(self, fed: Sequence[Sequence[int]], wanted: Sequence[int]) -> Verified:
        """Rows padded on the left, so that they end together."""
        model, pool, longest = self._runner.model, self._runner.pool, max(map(len, fed))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in fed])
        segments = None
        if any(len(row) < longest for row in fed):
            padding = longest - torch.tensor([len(row) for row in fed])
            real = torch.where(torch.arange(longest) < padding[:, None], -1, 0)
            segments = to_device(real, torch.int64, model.device)
        hidden = model.embedding(to_device(ids, torch.int64, model.device)).to(model.stream_dtype)
        hidden, after, _, _ = model.backbone(hidden, pool.state(range(len(fed))), segments)
        assert after is not None  # a state went in
        most = max(wanted)
        places = [row * most + place for row, count in enumerate(wanted) for place in range(most - count, most)]
        logits = _at(model.head(hidden[:, -most:]).float().flatten(0, 1), places)
        return _Launched(logits, after, pool, [len(row) for row in fed])


@dataclass(frozen=True)
class _Launched:
    logits: Tensor
    after: ModelState
    pool: StatePool
    fed: Sequence[int]  # tokens of each row

    @torch.inference_mode()
    def commit(self, true: Mapping[int, int]) -> None:
        rows = [row for row, count in true.items() if count == self.fed[row]]
        if rows:
            all_rows = len(rows) == len(self.fed)
            after = self.after if all_rows else self.after.select(torch.tensor(rows))
            self.pool.store(rows, after, [self.fed[row] for row in rows])


class _Graph:
    """A forward of equally long rows over the pool's own memory; what fills a row up is never committed."""

    def __init__(self, runner: Runner, decoder: VerifyDecoder, kept: Slabs, num_tokens: int) -> None:
        self._runner, self._decoder, self._kept, self._num_tokens = runner, decoder, kept, num_tokens
        ids = self._ids = torch.zeros(decoder.batch_size, dtype=torch.int64, device=runner.model.device)
        self._run = decoder.captured(lambda: decoder(ids).float())
        self.logits = torch.empty(0)
        self.num_runs = 0

    def __call__(self, fed: Sequence[Sequence[int]], wanted: Sequence[int]) -> "_Graph":
        self.num_runs += 1
        ids = self._decoder.filled(fed)
        self._ids[: len(ids)].copy_(to_device(ids, torch.int64, self._ids.device))
        self._runner.activate(len(fed))
        self._runner.pool.zero_fresh(len(fed))
        places = [
            row * self._num_tokens + place
            for row, count in enumerate(wanted)
            for place in range(len(fed[row]) - count, len(fed[row]))
        ]
        self.logits = _at(self._run(), places)
        return self

    @torch.inference_mode()
    def commit(self, true: Mapping[int, int]) -> None:
        if true:
            sources = [self._decoder.kept_after(row, count) for row, count in true.items()]
            self._runner.pool.take(list(true), self._kept, sources, list(true.values()))


def _at(logits: Tensor, places: Sequence[int]) -> Tensor:
    """Rows of [n v]."""
    if list(places) == list(range(len(places))):
        return logits[: len(places)]
    return logits[to_device(places, torch.int64, logits.device)]
