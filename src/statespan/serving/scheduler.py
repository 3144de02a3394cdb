"""Who runs: the queue, and how a step's prefill is shared. Policy only: no tensors, no memory."""

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

CANDIDATES = 64  # waiting jobs that are looked at in a step
MOST_HELD_UP = 8  # of these, that find too little memory; then the step tries no more
MOST_PASSED = 8  # times that later jobs go before one whose memory is not free yet


class Ordered(Protocol):
    """Something with a place in the queue."""

    @property
    def order(self) -> tuple[int, int]: ...


class Prefilling(Ordered, Protocol):
    """A prompt that is being absorbed."""

    snapshots_at: list[int]
    num_absorbed: int
    awaited_at: int  # tokens after which others go on from its snapshot; 0 where nobody waits

    @property
    def num_to_prefill(self) -> int: ...


Waiting = TypeVar("Waiting", bound=Ordered)
Prompt = TypeVar("Prompt", bound=Prefilling)


class Queue(list[Waiting]):
    """Waiting jobs, the next one first: by priority, then by arrival."""

    def add(self, job: Waiting) -> None:
        """Put a job in its place."""
        insort(self, job, key=lambda other: other.order)


def plan_prefill(jobs: Sequence[Prompt], budget: int, longest_waiting_share: float) -> list[tuple[Prompt, int]]:
    """How many tokens each job prefills now: (job, count) with count >= 1, together at most `budget`.

    Larger priorities go first and, within one, those with the fewest tokens left, so that a short prompt never waits
    for a long one; where others wait for a snapshot inside a prompt, its tokens up to there count. The job that has
    waited longest gets at least its share of the budget, whoever else is there, so that it ends in a bounded number of
    steps. A count ends where a snapshot is wanted.
    """
    waiting = [job for job in jobs if job.num_to_prefill > 0]
    if not waiting or budget < 1:
        return []
    counts: dict[int, int] = {}
    oldest = min(range(len(waiting)), key=lambda place: waiting[place].order[1])
    left = budget
    share = min(max(1, int(budget * longest_waiting_share)), _until_stop(waiting[oldest]))
    counts[oldest], left = share, left - share
    for place in sorted(range(len(waiting)), key=lambda at: (waiting[at].order[0], _left(waiting[at]), at)):
        count = min(left, _until_stop(waiting[place]) - counts.get(place, 0))
        counts[place] = counts.get(place, 0) + count
        left -= count
    return [(waiting[place], count) for place, count in sorted(counts.items()) if count > 0]


def _left(job: Prefilling) -> int:
    """Tokens until somebody can go on."""
    return job.awaited_at - job.num_absorbed if job.awaited_at > job.num_absorbed else job.num_to_prefill


def _until_stop(job: Prefilling) -> int:
    """Tokens until the prompt is absorbed or a snapshot is wanted."""
    stops = (stop - job.num_absorbed for stop in job.snapshots_at if stop > job.num_absorbed)
    return min(job.num_to_prefill, next(stops, job.num_to_prefill))


def snapshot_places(start: int, end: int, known: int, interval: int) -> list[int]:
    """Where the prefill of a prompt's tokens [start, end) takes snapshots, ascending; always at the end.

    Args:
        start: tokens that were restored.
        end: tokens after which the prefill ends.
        known: tokens that an earlier prompt began with too: where they part, a third one may come along.
        interval: from the beginning of the prompt to the first snapshot inside it; the next ones are at twice the
            distance each, so that a prompt of t tokens has log2(t / interval) of them.
    """
    places = {place for place in _doubling(interval, end) if place > start}
    if start < known < end:
        places.add(known)
    if end > start:
        places.add(end)
    return sorted(places)


def _doubling(interval: int, end: int) -> Iterator[int]:
    place = interval
    while place < end:
        yield place
        place *= 2
