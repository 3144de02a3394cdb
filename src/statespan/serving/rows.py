"""Rows: which row of the state pool belongs to whom. The rows being decoded are always the first ones."""

from collections.abc import Sequence

from statespan.serving.job import Job, Sample
from statespan.serving.snapshot import Snapshot
from statespan.serving.state_pool import StatePool


class Rows:
    """Rows of `pool` for jobs that are prefilled and samples that are decoded.

    The pool has one row more than are given away, so that there is always one to move a row to. Pages are given to a
    row at once; where a window lets go of them, they are promised and come on the way.

    Args:
        pool: of the rows.
        at_once: tokens that a forward takes of a row, at most.
    """

    def __init__(self, pool: StatePool, at_once: int = 1) -> None:
        self.pool, self.num_rows, self._at_once = pool, pool.num_rows - 1, at_once
        self.active: list[Sample] = []  # sample i is in row i
        self.prefilling: list[Job] = []

    @property
    def num_free(self) -> int:
        """Rows that nobody has and nobody was promised."""
        return self.num_rows - len(self.active) - sum(job.request.num_samples for job in self.prefilling)

    @property
    def pages_promised(self) -> int:
        """Pages that rows yet to be forked will take, and that rows will come to hold."""
        forks = sum(job.pages_promised for job in self.prefilling)
        if not self.pool.slides:
            return forks
        jobs = [*self.prefilling, *(sample.job for sample in self.active)]
        used = [*range(len(self.active)), *(job.row for job in self.prefilling)]
        held = {page for row in used for page in self.pool.pages_of(row)}  # a page of two rows is one, until they part
        return forks + max(0, sum(self.most_pages(job.num_tokens) for job in jobs) - len(held))

    def most_pages(self, num_tokens: int) -> int:
        """Pages that a row holds at most on its way to so many tokens."""
        return self.pool.most_pages(num_tokens, self._at_once)

    @property
    def spare(self) -> int:
        """A row that nobody has; there is always one."""
        return self._free_row()

    def begin(self, job: Job, snapshot: Snapshot | None, num_tokens: int) -> None:
        """Give a job a row, with pages for so many tokens, set to a snapshot if there is one.

        Raises:
            OutOfPages: the job has no row then.
        """
        row = self._free_row()
        try:
            if snapshot is not None:
                self.pool.restore(row, snapshot)
            self._reserve(row, num_tokens)
        except BaseException:
            self.pool.clear(row)
            raise
        job.row = row
        self.prefilling.append(job)

    def activate(self, job: Job, samples: Sequence[Sample], num_tokens: int) -> None:
        """The prompt is absorbed: its row becomes the first sample's, the others' are forked from it."""
        first = self._next_active_row(keep=job)
        if job.row != first:
            self.pool.move(job.row, first)
        job.row = -1
        self._activate(samples[0], first)
        for sample in samples[1:]:
            row = self._next_active_row()
            self.pool.fork(first, row)
            self._activate(sample, row)
            self._reserve(row, num_tokens)
        self.prefilling.remove(job)

    def leave(self, sample: Sample) -> None:
        """The row of a sample is free; the last one takes its place."""
        row = sample.row
        self.pool.clear(row)
        last = self.active.pop()
        if last is not sample:
            self.pool.move(last.row, row)
            self._place(last, row)
        sample.row = -1

    def drop(self, job: Job) -> None:
        """All rows of a job are free, whatever it was doing."""
        if job in self.prefilling:
            self.prefilling.remove(job)
        if job.row >= 0:
            self.pool.clear(job.row)
            job.row = -1
        for sample in [sample for sample in self.active if sample.job is job]:
            self.leave(sample)

    def check(self) -> None:
        """Raise AssertionError where the books are wrong."""
        assert [sample.row for sample in self.active] == list(range(len(self.active)))
        used = {*range(len(self.active)), *(job.row for job in self.prefilling)}
        assert len(used) == len(self.active) + len(self.prefilling) and len(used) <= self.num_rows
        assert self.num_free >= 0
        for row in range(self.pool.num_rows):
            if row not in used:
                assert not self.pool.pages_of(row) and not self.pool.num_tokens[row], f"row {row} leaks"

    def _reserve(self, row: int, num_tokens: int) -> None:
        if not self.pool.slides:
            self.pool.reserve(row, num_tokens)

    def _activate(self, sample: Sample, row: int) -> None:
        self.active.append(sample)
        sample.row = row

    def _place(self, sample: Sample, row: int) -> None:
        self.active[row], sample.row = sample, row

    def _next_active_row(self, keep: Job | None = None) -> int:
        """The row behind the active ones; a prompt that is prefilled there moves away, unless it is `keep`'s."""
        row = len(self.active)
        for job in self.prefilling:
            if job.row == row and job is not keep:
                target = self._free_row()
                self.pool.move(row, target)
                job.row = target
        return row

    def _free_row(self) -> int:
        """As far behind as possible, out of the way of the active ones."""
        used = {job.row for job in self.prefilling}
        return next(row for row in range(self.pool.num_rows - 1, len(self.active) - 1, -1) if row not in used)
