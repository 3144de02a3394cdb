"""The one form of an experiment: a claim, settings of its sizes, units of work that run alone, and what they show."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from statespan.errors import UnknownName, UserError

Row = dict[str, Any]  # JSON values
Progress = Callable[[float, str], None]  # share of the unit done, and figures to show beside it


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The sizes of an experiment; each experiment adds its own."""

    time: str  # what the whole setting takes, and where
    variants: tuple[str, ...]  # what is compared; each runs alone
    seeds: int = 1  # each variant runs with seeds 0 .. seeds-1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if not self.variants:
            raise UserError("variants is empty; name at least one")


S = TypeVar("S", bound=Setting)
Changes = dict[str, Any]  # fields of a setting


def settings_by_change(kind: type[S], h100: Changes, cpu: Changes, tiny: Changes) -> dict[str, S]:
    """An experiment's settings by what each changes: on a GPU, on a CPU beside that, and tiny beside both."""
    on_gpu = kind(**h100)
    on_cpu = replace(on_gpu, **cpu)
    return {"cpu": on_cpu, "h100": on_gpu, "tiny": replace(on_cpu, **tiny)}


@dataclass(frozen=True)
class Line:
    """A curve of a picture; None is a gap. Several seeds show as their mean, and each one pale beside it."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    seeds: Sequence[Sequence[float | None]] = ()
    published: bool = False  # dashed


@dataclass(frozen=True)
class Plot:
    """One panel of the picture."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    names: Sequence[str] = ()  # of the places 0, 1, .. along x, whose points are not joined


@dataclass(frozen=True)
class Table:
    """Rows under a heading; numbers are shown with as many digits as `digits` says."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    digits: int = 1


@dataclass(frozen=True)
class Check:
    """One thing that must come out, and whether it did; None: this setting cannot say."""

    text: str
    passed: bool | None
    ours: str = ""  # the figures it judges
    published: str = ""  # and those of the paper
    why: str = ""  # it may not come out on a GPU


@dataclass(frozen=True)
class Findings:
    """What the rows of a setting show."""

    checks: Sequence[Check]
    tables: Sequence[Table]
    plots: Sequence[Plot]


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """A claim that one command runs again.

    `run(setting, variant, seed, progress)` does one unit of work and returns its rows. Units share nothing, so that
    they may run on different machines; `report(setting, rows)` takes the rows of all units that are there, each with
    its `variant` and `seed`.
    """

    name: str
    title: str
    claim: str  # what is claimed, and what must come out
    source: str  # paper and table
    settings: Mapping[str, S]
    variants: Mapping[str, str]  # every variant there is, with what it is
    run: Callable[[S, str, int, Progress], Iterable[Row]]
    report: Callable[[S, Sequence[Row]], Findings]
    notes: Mapping[str, str]  # what a setting can and cannot show, by the setting's name
    timed: bool = False  # its rows are times: units run alone

    def check_variants(self, names: Iterable[str]) -> None:
        """Raise UnknownName for a variant that there is not."""
        for name in names:
            if name not in self.variants:
                raise UnknownName(f"variant of {self.name}", name, self.variants)
