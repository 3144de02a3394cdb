"""Prompts: how they get into rows, and what of them the prefix cache remembers."""

from collections.abc import Sequence

from torch import Tensor

from statespan.serving.admission import Admission
from statespan.serving.job import Job
from statespan.serving.options import EngineOptions
from statespan.serving.prefix_cache import PrefixCache
from statespan.serving.request import QueueFull, RequestRefused
from statespan.serving.rows import Rows
from statespan.serving.runner import Chunk, Runner


class Prompts:
    """Absorbs prompts into the rows of a runner's pool.

    Args:
        runner: feeds the rows.
        rows: who has them.
        cache: the prefix cache, if there is one.
        admission: says what memory there is.
        options: of the engine.
    """

    def __init__(
        self, runner: Runner, rows: Rows, cache: PrefixCache | None, admission: Admission, options: EngineOptions
    ) -> None:
        self._runner, self._pool, self._rows = runner, runner.pool, rows
        self._cache, self._admission, self._options = cache, admission, options

    def absorb(self, plan: Sequence[tuple[Job, int]]) -> None:
        """Feed each job so many tokens of its prompt, and take the snapshots that are wanted there."""
        chunks: list[Chunk] = []
        for job, count in plan:
            chunks.append(Chunk(job.row, job.request.prompt[job.num_absorbed : job.num_absorbed + count]))
        self._runner.absorb(chunks)
        for job, count in plan:
            job.num_absorbed += count
            if job.num_absorbed in job.snapshots_at:
                self.remember(job.row, job.request.prompt[: job.num_absorbed])

    def remember(self, row: int, tokens: Sequence[int]) -> None:
        """Give a snapshot of a row, which has absorbed `tokens`, to the prefix cache."""
        if self._cache is not None and not self._cache.has(tokens):
            self._cache.insert(tokens, self._pool.snapshot(row))

    def embed(self, prompt: tuple[int, ...]) -> Tensor:
        """The final norm's output [h] float32 on the CPU at the last token; a free row is used for it.

        Raises:
            RequestRefused: the prompt is empty, too long, or not of the vocabulary.
            QueueFull: running requests leave no memory for it.
        """
        self._admission.check_tokens(prompt)
        pages = max(self._rows.most_pages(len(prompt)), self._pool.pages_for(len(prompt)))
        if pages > self._pool.pages.num_pages - 1:
            raise RequestRefused(f"a prompt of {len(prompt)} tokens is too long; it needs {pages} pages")
        if not self._admission.room(pages):
            raise QueueFull("running requests leave no memory for the embedding now; try again later")
        row, size = self._rows.spare, self._options.prefill_tokens
        try:
            hidden = [
                self._runner.embed([Chunk(row, prompt[start : start + size])]) for start in range(0, len(prompt), size)
            ]
        finally:
            self._pool.clear(row)
        return hidden[-1][0].cpu()

    def warm_up(self) -> None:
        """Compile the kernels of a prefill now. Nothing may be running."""
        row, room = self._rows.spare, (self._pool.pages.num_pages - 1) * self._pool.page_size
        for length in (self._options.prefill_tokens, 1):
            self._runner.absorb([Chunk(row, (0,) * (min(length, room) if self._pool.pages_for(1) else length))])
            self._pool.clear(row)
