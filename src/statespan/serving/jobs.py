"""Jobs: those that wait and run in one engine, how they come and how they end."""

import logging
from collections import Counter
from collections.abc import Iterable

from statespan.errors import UserError, first_line
from statespan.serving.inbox import Inbox
from statespan.serving.job import Job
from statespan.serving.request import Event, FinishReason
from statespan.serving.rows import Rows
from statespan.serving.scheduler import Queue

_log = logging.getLogger(__name__)


class Jobs:
    """From the inbox through the queue and the rows to the last event.

    Args:
        rows: of the jobs that run.
        max_waiting: requests that may wait.
    """

    def __init__(self, rows: Rows, max_waiting: int) -> None:
        self.inbox = Inbox(max_waiting)
        self.queue: Queue[Job] = Queue()
        self.counts: Counter[str] = Counter()  # of EngineMetrics
        self.finished: Counter[str] = Counter()  # samples by reason
        self._rows = rows
        self._dated: set[Job] = set()  # those with a deadline that have not ended

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.inbox or self.queue or self._rows.prefilling or self._rows.active)

    def running(self) -> list[Job]:
        """Jobs that have rows."""
        return [*self._rows.prefilling, *dict.fromkeys(sample.job for sample in self._rows.active)]

    def arrive(self) -> list[Event]:
        """Take what came from other threads; end what was cancelled or is late."""
        arrived, cancelled = self.inbox.take()
        for job in arrived:
            self.queue.add(job)
            if job.request.deadline_s is not None:
                self._dated.add(job)
        events: list[Event] = []
        if not cancelled and not any(job.expired for job in self._dated):
            return events
        for job in [*self.queue, *self.running()]:
            if job.request.id in cancelled:
                events += self.end(job, "cancelled")
            elif job.expired:
                events += self.end(job, "deadline")
        return events

    def count_end(self, job: Job, reason: FinishReason) -> None:
        """One of the job's samples has ended; with the last of them the job has."""
        self.finished[reason] += 1
        job.num_open -= 1
        if job.num_open == 0:
            self._dated.discard(job)
            self.inbox.ended(job.request.id)

    def end(self, job: Job, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End what is left of a job, wherever it is; its memory is free."""
        samples = [sample for sample in self._rows.active if sample.job is job]
        events = [sample.end(reason, error) for sample in samples]
        if not samples:
            usage = job.usage()
            events = [
                Event(job.request.id, index, (), "", (), reason, usage, error)
                for index in range(job.request.num_samples)
            ]
        if job in self.queue:
            self.queue.remove(job)
        self._rows.drop(job)
        for _ in events:
            self.count_end(job, reason)
        return events

    def fail(self, jobs: Iterable[Job], error: Exception) -> list[Event]:
        """A step raised: its jobs end with an error, and the engine goes on."""
        self.counts["failures"] += 1
        if not isinstance(error, UserError):
            _log.error("a step of the engine failed", exc_info=error)
        return [event for job in jobs for event in self.end(job, "error", told(error))]

    def close(self) -> bool:
        """Drop all jobs and take no more; False where it was closed."""
        if not self.inbox.close():
            return False
        for job in self.running():
            self._rows.drop(job)
        self.queue.clear()
        return True

    def check(self) -> None:
        """Raise AssertionError unless the requests that have not ended are those that wait and run."""
        self._rows.check()
        self.inbox.check([*self.queue, *self.running()])


def told(error: Exception) -> str:
    """An error in one line, for who asked."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
