"""A toy experiment, and a folder of text for those that train on some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from statespan.lab.experiment import Check, Experiment, Findings, Line, Plot, Progress, Row, Setting, Table
from statespan.lab.registry import EXPERIMENTS

CALLS: list[tuple[str, int]] = []  # units that ran


@dataclass(frozen=True, kw_only=True)
class ToySetting(Setting):
    size: int = 3


def run(setting: ToySetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    CALLS.append((variant, seed))
    progress(0.5, "half")
    yield {"value": setting.size * 10 + seed}


def report(setting: ToySetting, rows: Sequence[Row]) -> Findings:
    line = Line("values", list(range(len(rows))), [row["value"] for row in rows])
    cells = [[row["variant"], float(row["value"])] for row in rows]
    there, large = bool(rows), rows[0]["value"] > 99
    checks = [
        Check("a value there is", there, "30", "31"),
        Check("larger than 99", large, why="it is small"),
        Check("?", None),
    ]
    return Findings(checks, [Table("Values", ["variant", "value"], cells, digits=2)], [Plot("t", "x", "y", [line])])


VARIANTS = {"one": "the first", "two": "the second"}
TOY = Experiment(
    name="toy",
    title="A toy",
    claim="Toys work. Always.",
    source="nowhere",
    settings={
        "cpu": ToySetting(time="no time", variants=("one", "two"), seeds=2),
        "h100": ToySetting(time="none either", variants=("one",), device="cuda"),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    notes={"cpu": "A note."},
)


@pytest.fixture
def toy() -> Experiment[ToySetting]:
    CALLS.clear()
    return TOY


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    return CALLS


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small documents."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(40):
        (folder / f"{index}.py").write_text(f"def document_{index}(x):\n    return x * {index}\n" * 12)
    return folder


@pytest.fixture(params=EXPERIMENTS)
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return EXPERIMENTS[request.param]
