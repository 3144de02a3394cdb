"""Finished units of an experiment as JSON lines: appended one by one, read back, taken over from other folders."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from statespan.dataclass_io import from_plain
from statespan.errors import UserError
from statespan.lab.experiment import Row


@dataclass(frozen=True)
class Unit:
    """One variant with one seed, finished."""

    variant: str
    seed: int
    setting: dict  # the sizes it ran with
    machine: dict  # and where: text by name
    command: str
    finished: str  # date and time
    seconds: float
    processor_s: float  # of all threads
    rows: list  # of Row
    jobs: int = 1  # units that ran side by side with it, itself included

    def labelled_rows(self) -> list[Row]:
        """The rows, each with variant and seed."""
        return [{"variant": self.variant, "seed": self.seed} | row for row in self.rows]


def results_path(folder: Path, experiment: str, setting: str) -> Path:
    return folder / f"{experiment}.{setting}.jsonl"


def read_units(path: Path) -> list[Unit]:
    """The finished units of a file; none where there is no file. A line cut off by an interruption is left out.

    Raises:
        UserError: the file holds something else.
    """
    units: list[Unit] = []
    if not path.exists():
        return units
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            units.append(from_plain(Unit, json.loads(line)))
        except (json.JSONDecodeError, UserError) as error:
            raise UserError(f"{path}: line {number} is no result of the lab: {error}") from None
    return units


def write_units(path: Path, units: Iterable[Unit]) -> None:
    """Replace the file by these units."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(unit) for unit in units), encoding="utf-8")
    partial.replace(path)


def append_unit(path: Path, unit: Unit) -> None:
    """Add a finished unit, and force it to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(unit))
        file.flush()
        os.fsync(file.fileno())


def _line(unit: Unit) -> str:
    return json.dumps(asdict(unit)) + "\n"


def merged(units: Sequence[Unit], others: Iterable[Unit]) -> list[Unit]:
    """`units`, and of `others` those whose variant and seed are not there yet."""
    found = {(unit.variant, unit.seed): unit for unit in units}
    for unit in others:
        found.setdefault((unit.variant, unit.seed), unit)
    return list(found.values())
