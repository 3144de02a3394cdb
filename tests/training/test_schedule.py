"""Learning rates against the closed forms, worked out by hand."""

import math

import pytest

from statespan.training.config import ScheduleConfig
from statespan.training.schedule import learning_rate_factor, progress


@pytest.mark.parametrize(
    ("p", "factor"),
    [
        (0.05, 0.5),  # half of the warm-up
        (0.1, 1.0),  # its end
        (0.325, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (0.55, 0.55),  # half of it
        (1.0, 0.1),
        (1.5, 0.1),  # past the end
    ],
)
def test_cosine(p: float, factor: float):
    config = ScheduleConfig("cosine", warmup_fraction=0.1, final_ratio=0.1)
    assert learning_rate_factor(p, config) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "factor"), [(0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.8, 1.0), (0.9, 0.6), (0.95, 0.4), (1.0, 0.2)]
)
def test_warmup_stable_decay(p: float, factor: float):
    config = ScheduleConfig("wsd", warmup_fraction=0.1, decay_fraction=0.2, final_ratio=0.2)
    assert learning_rate_factor(p, config) == pytest.approx(factor, abs=1e-12)


def test_constant():
    config = ScheduleConfig("constant", warmup_fraction=0.2)
    assert [learning_rate_factor(p, config) for p in (0.1, 0.2, 0.6, 1.0)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_extreme_shares_stay_finite(kind: str):
    config = ScheduleConfig(kind, warmup_fraction=0.0, decay_fraction=0.0)  # type: ignore[arg-type]
    assert learning_rate_factor(1e-9, config) == pytest.approx(1.0)
    only_warmup = ScheduleConfig(kind, warmup_fraction=1.0, decay_fraction=0.0)  # type: ignore[arg-type]
    assert learning_rate_factor(0.25, only_warmup) == 0.25


def test_progress_follows_steps_seconds_or_the_faster_of_both():
    assert progress(3, 10.0, 12, None) == 0.25
    assert progress(3, 10.0, None, 40.0) == 0.25
    assert progress(6, 10.0, 12, 40.0) == 0.5
    assert progress(3, 30.0, 12, 40.0) == 0.75
