"""When to speculate, with a clock that is made up: hardly slower than plain steps, and fast where drafts come true."""

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from statespan.generation.pace import SHARE, Kind, Pace


@dataclass
class Clock:
    """Steps as an engine would take them: costs in plain steps, drafts that come true by chance."""

    cost: float  # of a step that verifies
    chance: float  # of a draft to come true
    num_drafts: int = 4
    vain: float = 0.0  # chance that there are no drafts
    bubble: float = 0.15  # of plain steps, lost whenever the way changes
    noise: float = 0.03
    reading: float = 0.0  # of plain steps, that the first of several steps which verify takes longer

    def run(self, pace: Pace, num_rows: int, tokens: int, seed: int = 0) -> tuple[float, float]:
        """Speed against plain steps alone over so many tokens of each row, and the share of steps that speculated."""
        drawn, left, total, ways = random.Random(seed), num_rows * tokens, 0.0, list[bool]()
        before = drafted = False
        while left > 0:
            speculates = pace.speculates(num_rows)
            ways.append(speculates)
            given, seconds, kind, steady = num_rows, 1.0, Kind.PLAIN, speculates == before
            if speculates and before and drawn.random() < self.vain:
                seconds, kind = 1 + self.bubble, Kind.VAIN
            elif speculates and before:
                given, seconds, kind = sum(self.accepted(drawn) for _ in range(num_rows)), self.cost, Kind.VERIFIED
                seconds += 0 if drafted else self.reading
                steady, drafted = drafted, True
            else:
                seconds, drafted = (1.0 if steady else 1 + self.bubble), False
            seconds *= 1 + self.noise * abs(drawn.gauss())
            pace.note(num_rows, kind, seconds, given, steady=steady)
            before, left, total = speculates, left - given, total + seconds
        return tokens * (1 + 0.8 * self.noise) / total, sum(ways) / len(ways)

    def accepted(self, drawn: random.Random) -> int:
        return next((k + 1 for k in range(self.num_drafts) if drawn.random() >= self.chance), self.num_drafts + 1)

    @property
    def always(self) -> float:
        """Speed of speculation that is never off."""
        a = self.chance
        return (1 - a ** (self.num_drafts + 1)) / (1 - a) / self.cost


COSTS = [(1, 1.8), (1, 4.0), (8, 1.2), (8, 3.5), (64, 1.7), (64, 4.6)]  # of so many rows


@pytest.mark.parametrize(("num_rows", "cost"), COSTS)
@pytest.mark.parametrize("chance", [0.02, 0.2, 0.6, 0.8, 0.95])
def test_never_loses_much_and_gains_what_there_is(num_rows: int, cost: float, chance: float) -> None:
    """A first request of 128 tokens; further ones, which begin with what it taught; and a long one."""
    clock, first, later = Clock(cost, chance), list[float](), list[float]()
    for seed in range(8):
        pace = Pace()
        first.append(clock.run(pace, num_rows, 128, seed)[0])
        later += [clock.run(pace, num_rows, 128, 100 * seed + number)[0] for number in range(1, 4)]
    assert min(first) > 0.89 and sum(first) / 8 > 0.91
    assert min(later) > 0.9 and sum(later) / 24 > 0.95
    assert sum(later) / 24 > 0.87 * clock.always
    speed, _ = clock.run(Pace(), num_rows, 5000)
    assert speed > max(1 - 2 * SHARE, 0.9 * clock.always)


@pytest.mark.parametrize(("num_rows", "cost"), [(1, 1.8), (8, 1.2), (64, 1.7)])
def test_follows_a_change_of_the_text(num_rows: int, cost: float) -> None:
    pace, poor, good = Pace(), Clock(cost, 0.1), Clock(cost, 0.85)
    poor.run(pace, num_rows, 300)
    assert good.run(pace, num_rows, 1024)[0] > 0.7 * good.always
    assert poor.run(pace, num_rows, 512)[0] > 0.93  # with one row some 35 steps pass until the mean has seen it
    assert good.run(pace, num_rows, 1024, seed=1)[0] > 0.7 * good.always


def test_follows_a_change_of_the_cost() -> None:
    """Speculation that was slow because of something else is found again."""
    pace = Pace()
    assert Clock(5.0, 0.8).run(pace, 4, 1000)[1] < 0.05
    assert Clock(1.5, 0.8).run(pace, 4, 3000)[0] > 0.85 * Clock(1.5, 0.8).always


def test_costs_belong_to_the_number_of_rows() -> None:
    """Few rows gain while many would lose; rows never seen begin like their neighbours."""
    pace, few, many = Pace(), (0.0, 0.0), (0.0, 0.0)
    for _ in range(3):
        few = Clock(1.5, 0.8).run(pace, 2, 300)
        many = Clock(6.0, 0.8).run(pace, 64, 300)
    assert few[0] > 1.8 and few[1] > 0.8
    assert many[0] > 0.95 and many[1] < 0.05
    assert pace.speculates(2) and not pace.speculates(40)
    assert Clock(1.5, 0.8).run(pace, 4, 20)[1] > 0.5 and Clock(6.0, 0.8).run(pace, 32, 60)[1] < 0.05


def test_text_without_drafts_costs_little() -> None:
    """Steps that look for drafts in vain are slower than plain ones, which run ahead; a look now and then is cheap."""
    pace = Pace()
    speed, share = Clock(1.8, 0.9, vain=1.0).run(pace, 1, 2000)
    assert speed > 1 - 2 * SHARE and 0 < share < 0.2
    found = Clock(1.8, 0.9, num_drafts=6)
    assert found.run(pace, 1, 512)[0] > 0.75 * found.always
    assert Clock(1.8, 0.9, num_drafts=8, vain=0.5).run(Pace(), 1, 4000)[0] > 1.4
    assert Clock(4.0, 0.35, vain=0.95).run(Pace(), 1, 4000)[0] > 1 - 2 * SHARE  # seldom any, and these are bad


def test_what_a_drafter_reads_first_is_not_judged_and_is_paid() -> None:
    """The first step that verifies after plain ones takes 30 times as long."""
    assert Clock(1.2, 0.8, reading=30.0).run(Pace(), 8, 2000)[0] > 0.85 * Clock(1.2, 0.8).always
    assert Clock(4.0, 0.2, reading=30.0).run(Pace(), 64, 20_000)[0] > 1 - 2 * SHARE


@pytest.mark.parametrize(("steady", "tokens"), [(True, 8000), (False, 8000)])
def test_a_trial_that_took_for_ever_is_forgotten(steady: bool, tokens: int) -> None:
    pace, clock = Pace(), Clock(1.5, 0.9)
    Clock(3.0, 0.1).run(pace, 8, 300)
    while not pace.speculates(8):
        pace.note(8, Kind.PLAIN, 1.0, 8)
    pace.note(8, Kind.VERIFIED, 10_000.0, 8, steady=steady)
    assert clock.run(pace, 8, tokens)[0] > 0.6 * clock.always


def test_does_not_flip_for_little() -> None:
    pace, ways = Pace(), list[bool]()
    for _ in range(3000):  # as fast as plain steps, exactly
        ways.append(pace.speculates(16))
        pace.note(16, Kind.VERIFIED if ways[-1] else Kind.PLAIN, 2.0 if ways[-1] else 1.0, 32 if ways[-1] else 16)
    assert sum(a != b for a, b in pairwise(ways)) < 20


def test_a_row_count_that_never_runs_ahead_ends_its_trials() -> None:
    """Steps that say nothing, one after the other: the way that is known goes on."""
    pace = Pace()
    for _ in range(20):
        pace.note(1, Kind.PLAIN, 1.0, 1)
    ways = list[bool]()
    for _ in range(2000):
        ways.append(pace.speculates(1))
        pace.note(1, Kind.VERIFIED if ways[-1] else Kind.PLAIN, 2.0 if ways[-1] else 1.0, 1, steady=not ways[-1])
    assert 0 < sum(ways) < 0.03 * len(ways)
