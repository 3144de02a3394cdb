"""DraftRows: the sequences of a small model that runs ahead of the one that is served, and is set back again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from statespan.models.decoder import Decoder
from statespan.models.language_model import LanguageModel
from statespan.models.slabs import Slabs
from statespan.models.transfer import to_device
from statespan.ops.decode_step.tokens import choose_best
from statespan.serving.job import Sample
from statespan.serving.page_pool import OutOfPages
from statespan.serving.pool_memory import bucket
from statespan.serving.runner import Chunk, Runner
from statespan.serving.snapshot import Mark
from statespan.serving.state_pool import StatePool

Texts = Mapping[Sample, Sequence[int]]  # in the small model's tokens


class DraftRows:
    """A row of the small model's pool for each sample that it drafts for: sample i has row i.

    Between two calls a row has absorbed a beginning of the sample's text, at most all of it but the last token, or a
    text that it tried itself, which `settle` takes back as far as it came out differently.

    Args:
        model: the small one, in evaluation.
        num_rows: samples at once.
        num_pages: of its keys and values, page 0 included.
        page_size: tokens of a page.
        prefill_tokens: absorbed in one call, at most: what runs must not wait for a new one's prompt.
    """

    def __init__(
        self, model: LanguageModel, *, num_rows: int, num_pages: int, page_size: int, prefill_tokens: int
    ) -> None:
        self.model, self.samples = model.eval(), list[Sample]()
        self.pool = StatePool(model, num_rows, num_pages, page_size, rewinds=True)
        self._runner, self._prefill_tokens = Runner(model, self.pool), prefill_tokens
        self._left_out: set[Sample] = set()  # there were no pages for them
        self._marks: list[Mark] = []  # before the first step of the last run, and after each
        self._fed: list[list[int]] = []  # the tokens of each row in that run
        self._in_graphs = self.pool.device.type == "cuda"
        self._greedy: dict[tuple[int, int], _Greedy] = {}  # by rows and steps; they share the memory for states
        self._kept: Slabs | None = None

    def follow(self, samples: Sequence[Sample], room: Mapping[Sample, int]) -> None:
        """Have rows for these samples and no others, each with room for so many tokens."""
        self._left_out &= set(samples)
        wanted = dict.fromkeys(sample for sample in samples if sample not in self._left_out)
        for sample in [sample for sample in self.samples if sample not in wanted]:
            self._leave(sample)
        present = set(self.samples)
        for sample in wanted:
            if sample not in present:
                try:
                    self.pool.reserve(len(self.samples), room[sample])
                    self.samples.append(sample)
                except OutOfPages:
                    self._left_out.add(sample)

    def _leave(self, sample: Sample) -> None:
        """Its row is free; the last one takes its place."""
        row, last = self.samples.index(sample), len(self.samples) - 1
        self.pool.clear(row)
        if row < last:
            self.pool.move(last, row)
            self.samples[row] = self.samples[last]
        self.samples.pop()

    def settle(self, texts: Texts) -> None:
        """Keep of the last run what came true; call it before the rows change."""
        rows, marks = list[int](), list[Mark]()
        for row, (sample, fed) in enumerate(zip(self.samples, self._fed, strict=False)):
            text = texts.get(sample, ())[self._marks[0].num_tokens[row] :]
            kept = _num_equal(fed, text[:-1])
            if kept < len(fed):
                rows.append(row)
                marks.append(self._marks[kept])
        if rows:
            self.pool.rewind(rows, marks)
        self._marks, self._fed = [], []

    def read(self, texts: Texts) -> list[int]:
        """Absorb what is new in the texts but their last tokens. The rows that are done with that."""
        left = self._prefill_tokens
        chunks: list[Chunk] = []
        behind = {row: len(texts[sample]) - 1 - self.pool.num_tokens[row] for row, sample in enumerate(self.samples)}
        for row in sorted(behind, key=lambda row: behind[row]):
            done, count = self.pool.num_tokens[row], min(behind[row], left)
            if count > 0:
                chunks.append(Chunk(row, tuple(texts[self.samples[row]][done : done + count])))
                left -= count
        if chunks:
            self._runner.absorb(chunks)
        return [row for row, sample in enumerate(self.samples) if self.pool.num_tokens[row] == len(texts[sample]) - 1]

    def begin(self) -> None:
        """The rows can be set back to here."""
        self._marks = [self.pool.mark(len(self.samples))]

    def mark(self) -> None:
        """And to here, after a step."""
        self._marks.append(self.pool.mark(len(self.samples)))

    def step(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Feed each row a token: logits [n v] float32, overwritten by the next step."""
        return self._runner.decode(ids)

    @torch.inference_mode()
    def run_greedily(self, ids: Sequence[int], count: int) -> Tensor | None:
        """As `begin`, and then `step` and `mark` so often, each with the most likely token of the last one.

        Returns:
            The tokens chosen [count n] int64; None where a CUDA graph cannot hold the steps, and nothing was done.
        """
        pool, size = self.pool, bucket(len(ids))
        greedy = self._steps(size, count)
        if greedy is None:
            return None
        self._runner.activate(len(ids))
        pool.zero_fresh(len(ids))
        greedy.ids[: len(ids)].copy_(to_device(ids, torch.int64, pool.device))
        self._marks = []
        for place in range(count + 1):
            rows = slice(place * size, place * size + len(ids))
            states = [tensor[:, rows] for tensor in greedy.kept.tensors]
            self._marks.append(Mark(states, tuple(pool.num_tokens[: len(ids)])))
            if place < count:
                pool.advance(len(ids))
        return greedy.run()[:, : len(ids)]

    @torch.inference_mode()
    def warm_up(self, count: int) -> None:
        """On a GPU, capture the graphs of so many greedy steps, and of single ones, while no row is in use."""
        self._runner.warm_up()
        for size in self._runner.graph_sizes if count else ():
            if greedy := self._steps(size, count):
                self._runner.activate(0)
                for _ in range(2):
                    greedy.run()

    def _steps(self, size: int, count: int) -> "_Greedy | None":
        """So many greedy steps of so many rows; None: a CUDA graph cannot hold them."""
        if self._in_graphs and (size, count) not in self._greedy:
            pool = self.pool
            decoder = self.model.decoder(size, memory=pool.leading(size), active=pool.active[:size])
            if pool.device.type == "cuda" and not decoder.captures:
                self._in_graphs = False
                return None
            if self._kept is None or self._kept.num_rows < (count + 1) * size:
                self._greedy.clear()  # with the memory that they hold
                self._kept = None
                self._kept = pool.slabs((count + 1) * size)
            self._greedy[size, count] = _Greedy(decoder, pool, self._kept, size, count)
        return self._greedy[size, count] if self._in_graphs else None

    def end(self, fed: Mapping[int, Sequence[int]]) -> None:
        """The tokens that some rows were fed since `begin`, for `settle`, with a mark after each; the others are set
        back now."""
        self._fed = [list(fed.get(row, ())) for row in range(len(self.samples))]
        others = [row for row in range(len(self.samples)) if row not in fed]
        if others:
            self.pool.rewind(others, [self._marks[0]] * len(others))


class _Greedy:
    """So many steps of `size` rows of a pool, each with the likeliest token of the one before: one CUDA graph."""

    def __init__(self, decoder: Decoder, pool: StatePool, kept: Slabs, size: int, count: int) -> None:
        """`kept` is for the states before the first step, and after each."""
        self.ids = ids = torch.zeros(size, dtype=torch.int64, device=pool.device)
        self.kept = kept
        chosen, best = ids.new_zeros(count, size), torch.zeros(size, device=pool.device)

        def run() -> Tensor:
            pool.copy_to(kept, 0, size)
            for place in range(count):
                choose_best(decoder(ids).float(), ids, best)
                chosen[place].copy_(ids)
                pool.copy_to(kept, (place + 1) * size, size)
            return chosen

        self.run = decoder.captured(run)


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
