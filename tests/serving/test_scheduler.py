"""The policy on plain numbers: no model, no memory."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from statespan.serving.scheduler import Queue, plan_prefill, snapshot_places


@dataclass(eq=False)
class Prompt:
    size: int
    arrival: int
    priority: int = 0
    num_absorbed: int = 0
    snapshots_at: list[int] = field(default_factory=list)
    awaited_at: int = 0

    @property
    def num_to_prefill(self) -> int:
        return self.size - self.num_absorbed

    @property
    def order(self) -> tuple[int, int]:
        return -self.priority, self.arrival


def planned(jobs: list[Prompt], budget: int, share: float = 0.25) -> dict[int, int]:
    return {job.arrival: count for job, count in plan_prefill(jobs, budget, share)}


def test_the_queue_is_by_priority_then_arrival() -> None:
    queue: Queue[Prompt] = Queue()
    for job in (Prompt(1, 0), Prompt(1, 1, priority=2), Prompt(1, 2), Prompt(1, 3, priority=2), Prompt(1, 4, -1)):
        queue.add(job)
    assert [job.arrival for job in queue] == [1, 3, 0, 2, 4]


def test_short_prompts_go_first_and_the_oldest_keeps_its_share() -> None:
    long, short, middle = Prompt(100_000, 0), Prompt(10, 1), Prompt(500, 2)
    assert planned([long, short, middle], 1000) == {0: 490, 1: 10, 2: 500}
    assert planned([long, short, middle], 400) == {0: 100, 1: 10, 2: 290}
    assert planned([short, middle], 400) == {1: 10, 2: 390}
    assert planned([long], 400) == {0: 400}


def test_priority_comes_before_length() -> None:
    urgent, short, old = Prompt(1000, 2, priority=1), Prompt(5, 1), Prompt(1000, 0)
    assert planned([old, short, urgent], 400) == {0: 100, 2: 300}


def test_a_chunk_ends_where_a_snapshot_is_wanted() -> None:
    job = Prompt(100, 0, num_absorbed=10, snapshots_at=[10, 30, 100])
    assert planned([job], 500) == {0: 20}
    job.num_absorbed = 30
    assert planned([job], 500) == {0: 70}
    assert planned([job], 50) == {0: 50}


def test_nothing_to_do() -> None:
    assert planned([], 100) == {}
    assert planned([Prompt(5, 0, num_absorbed=5)], 100) == {}
    assert planned([Prompt(5, 0)], 0) == {}


prompts = st.lists(st.tuples(st.integers(0, 300), st.integers(-1, 1), st.integers(0, 299)), min_size=1, max_size=8)


@given(prompts, st.integers(1, 200), st.floats(0.01, 1))
def test_everyone_ends_within_a_bound(sizes: list[tuple[int, int, int]], budget: int, share: float) -> None:
    """Whoever is oldest ends within its size / share of the budget steps, whatever else is there."""
    jobs = [
        Prompt(size, arrival, priority, snapshots_at=[stop] if stop < size else [])
        for arrival, (size, priority, stop) in enumerate(sizes)
    ]
    steps = 0
    total = sum(job.size for job in jobs)
    oldest = next((job for job in jobs if job.size), None)
    while plan := plan_prefill(jobs, budget, share):
        steps += 1
        assert sum(count for _, count in plan) <= budget
        assert len({id(job) for job, _ in plan}) == len(plan)
        for job, count in plan:
            before, job.num_absorbed = job.num_absorbed, job.num_absorbed + count
            assert count >= 1 and job.num_absorbed <= job.size
            assert not any(before < stop < job.num_absorbed for stop in job.snapshots_at)
        if oldest is not None and steps >= oldest.size / max(1, int(budget * share)) + 2:
            assert oldest.num_to_prefill == 0
        waiting = sum(job.num_to_prefill for job in jobs)
        cut = any(job.num_absorbed in job.snapshots_at for job, _ in plan)
        assert cut or waiting == 0 or sum(count for _, count in plan) == budget, "some of the budget was wasted"
    assert sum(job.num_absorbed for job in jobs) == total


def test_where_snapshots_are_taken() -> None:
    assert snapshot_places(0, 99, 0, 512) == [99]
    assert snapshot_places(0, 5000, 0, 512) == [512, 1024, 2048, 4096, 5000]
    assert snapshot_places(1024, 5000, 3000, 512) == [2048, 3000, 4096, 5000]
    assert snapshot_places(99, 99, 99, 512) == []
    assert snapshot_places(40, 99, 40, 512) == [99]
    assert snapshot_places(0, 512, 0, 512) == [512]
    assert len(snapshot_places(0, 1_000_000, 0, 512)) == 12
