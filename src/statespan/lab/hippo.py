"""HiPPO: how well a state of N numbers remembers a signal, and what stretching time does to it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Line, Plot, Progress, Row, Setting, Table
from statespan.ops.lti import project, reconstruct

SAME = 0.02  # of an error: what the step size of the bilinear form may leave, or change
SHOWN = 400  # points of the picture
SPANS = {"legt": 0.5, "lagt": 0.05}  # of the signal: the window, the unit of age
REMEMBERED = {"legs": 1.0, "legt": 1.0, "lagt": 4.0}  # ages looked at, in the measure's own unit


@dataclass(frozen=True, kw_only=True)
class HippoSetting(Setting):
    """Length of the signals and sizes of the state."""

    length: int = 2000  # samples
    state_sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
    waves: int = 12  # highest frequency, in periods of the whole signal
    stretch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.state_sizes or min(self.state_sizes) < 2:
            raise UserError(f"state_sizes must be at least 2, got {list(self.state_sizes)}")
        if self.length < 20 * self.waves:
            raise UserError(f"length {self.length} is too short for {self.waves} waves; give {20 * self.waves} or more")
        if self.stretch < 2:
            raise UserError(f"stretch must be at least 2, got {self.stretch}")


def signal(length: int, waves: int, seed: int) -> Tensor:
    """[t] float64: a sum of sines of 1 .. waves periods, with random amplitudes and phases, of variance near 1."""
    random = torch.Generator().manual_seed(seed)
    time = torch.arange(1, length + 1, dtype=torch.float64) / length
    frequency = torch.arange(1, waves + 1, dtype=torch.float64).unsqueeze(1)
    phase = torch.rand(waves, 1, generator=random, dtype=torch.float64)
    weight = torch.randn(waves, 1, generator=random, dtype=torch.float64) * (2 / waves) ** 0.5
    return (weight * torch.sin(2 * torch.pi * (frequency * time + phase))).sum(0)


def run(setting: HippoSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """The relative error of the past told from the last state, of the signal and of the same signal stretched."""
    for index, state_size in enumerate(setting.state_sizes):
        progress(index / len(setting.state_sizes), f"N = {state_size}")
        past, told = recall(setting, variant, setting.length, state_size, seed)
        stretched, told_stretched = recall(setting, variant, setting.length * setting.stretch, state_size, seed)
        yield {
            "state_size": state_size,
            "error": _relative(told, past),
            "stretched_error": _relative(told_stretched, stretched),
        }
        if seed == 0 and index == len(setting.state_sizes) // 2:
            step = max(1, len(past) // SHOWN)
            yield {"state_size": state_size, "past": past[::step].tolist(), "told": told[::step].tolist()}


def recall(setting: HippoSetting, measure: str, length: int, state_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The past of a signal of `length` samples, newest first, as far as the measure looks; and as the state tells it.

    Stretching makes the signal slower and leaves the window and the unit of age as they are, in samples.
    """
    whole = signal(length, setting.waves, seed)
    span = None if measure == "legs" else SPANS[measure] * setting.length
    coefficients = project(whole, measure, state_size, span=span)[-1]
    count = length if span is None else min(length, round(REMEMBERED[measure] * span))
    ages = (torch.arange(count, dtype=torch.float64) + 0.5) / (length if span is None else span)
    return whole.flip(0)[:count], reconstruct(coefficients, measure, ages)


def _relative(told: Tensor, truth: Tensor) -> float:
    return ((told - truth).norm() / truth.norm()).item()


def report(setting: HippoSetting, rows: Sequence[Row]) -> Findings:
    """Errors by N, and their change under stretching."""
    checks: list[Check] = []
    for measure in VARIANTS:
        means = [table.mean_of(rows, "error", variant=measure, state_size=n) for n in setting.state_sizes]
        falls = [table.ordered(max(before or 0, SAME), after) for before, after in pairwise(means)]
        ours = table.told(dict(zip((f"N = {n}:" for n in setting.state_sizes), means, strict=True)), 3)
        text = f"{measure}: the error falls with every larger N, down to {SAME}"
        checks.append(Check(text, table.all_of(*falls), ours, "falls"))
    changes = [abs(row["error"] - row["stretched_error"]) for row in table.of(rows, variant="legs") if "error" in row]
    text = f"legs: stretching time {setting.stretch} times changes no error by more than {SAME}"
    ours = f"{max(changes):.4f}" if changes else ""
    checks.append(Check(text, max(changes) < SAME if changes else None, ours, "none"))
    columns = ["N", *(f"{m}, {which}" for m in VARIANTS for which in ("signal", "stretched"))]
    cells = [
        [
            str(size),
            *(
                table.mean_of(rows, field, variant=m, state_size=size)
                for m in VARIANTS
                for field in ("error", "stretched_error")
            ),
        ]
        for size in setting.state_sizes
    ]
    lines = table.lines(VARIANTS, rows, "state_size", "error")
    errors = Plot("Relative error of the past", "N", "error", lines, log_x=True, log_y=True)
    title = "Relative L2 error, mean over the seeds"
    return Findings(checks, [Table(title, columns, cells, digits=4)], [errors, *_pictures(rows)])


def _pictures(rows: Sequence[Row]) -> list[Plot]:
    found: list[Plot] = []
    for row in rows:
        if "past" in row:
            ages = [index / len(row["past"]) for index in range(len(row["past"]))]
            lines = [Line("signal", ages, row["past"]), Line(f"told by {row['state_size']} numbers", ages, row["told"])]
            found.append(Plot(f"{row['variant']}: {VARIANTS[row['variant']]}", "age / oldest age shown", "", lines))
    return found


VARIANTS = {
    "legs": "all of the past, evenly",
    "legt": "a sliding window, evenly",
    "lagt": "fading with age",
}

EXPERIMENT = Experiment(
    name="hippo",
    title="HiPPO: what a state remembers",
    claim="A state of N numbers holds the past of a signal as coefficients on polynomials: the error falls with N. "
    "LegS needs no time scale: the same signal, slower, is remembered as well.",
    source="HiPPO, arXiv 2008.07669, section 3 and figure 2",
    settings={
        "cpu": HippoSetting(time="30 s of 2 cores", variants=tuple(VARIANTS), seeds=3),
        "h100": HippoSetting(
            time="5 minutes of a core; nothing of it is for a GPU",
            variants=tuple(VARIANTS),
            seeds=3,
            length=10_000,
            waves=40,
            state_sizes=(8, 16, 32, 64, 128, 256),
        ),
        "tiny": HippoSetting(time="a second", variants=tuple(VARIANTS), length=120, waves=3, state_sizes=(4, 8, 16)),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    notes={
        "cpu": "The signals are sums of sines, so that the error is that of the state and not of noise. LegT and LagT "
        "keep their window in samples when time is stretched: they then see a shorter part of the signal, and better."
    },
)
