"""The loss curve of a demo: drawn as a picture, and carried on to guess how much time a lower figure would take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statespan.training import read_metrics

FEWEST_POINTS_TO_FIT = 8
LONGEST_GUESS = 100.0  # times the training time; beyond, a curve this short says nothing


@dataclass(frozen=True)
class CurvePoint:
    """The training loss over the steps since the point before."""

    seconds: float  # of training
    bits_per_byte: float


@dataclass(frozen=True)
class Level:
    """A figure on the held-out text, drawn as a horizontal line."""

    name: str
    bits_per_byte: float
    color: str


def read_curve(run_directory: Path) -> list[CurvePoint]:
    """The training curve that a run left in its metrics."""
    rows = [row for row in read_metrics(run_directory) if "bits_per_byte" in row]
    return [CurvePoint(_number(row["seconds"]), _number(row["bits_per_byte"])) for row in rows]


def _number(value: float | list[float]) -> float:
    assert not isinstance(value, list)  # metrics rows hold lists for expert shares only
    return value


def draw_curve(path: Path, points: Sequence[CurvePoint], levels: Sequence[Level]) -> None:
    """Write a PNG of the training curve over time with `levels` as lines across it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last_s = points[-1].seconds if points else 1.0
    unit, divisor = ("minutes", 60.0) if last_s >= 60 else ("seconds", 1.0)
    times = [point.seconds / divisor for point in points]
    axes.plot(times, [point.bits_per_byte for point in points], color="#1f6feb", linewidth=1.2, label="training text")
    for level in levels:
        label = f"{level.name}: {level.bits_per_byte:.3f}"
        axes.axhline(level.bits_per_byte, color=level.color, linestyle="--", linewidth=1.2, label=label)
    axes.set_xlim(0, last_s / divisor)
    axes.set_ylim(*_limits(points, levels))
    axes.set_xlabel(f"training time ({unit})")
    axes.set_ylabel("bits per byte")
    axes.set_title("Bits per byte while training, and of the held-out files")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, format="png")


def _limits(points: Sequence[CurvePoint], levels: Sequence[Level]) -> tuple[float, float]:
    """Room for every level and for the curve, without the first steps, which would press the rest flat."""
    settled = [p.bits_per_byte for p in points if p.seconds >= 0.05 * points[-1].seconds]
    values = [level.bits_per_byte for level in levels] + settled
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) + 0.05
    return max(0.0, low - margin), high + margin


def seconds_to_reach(target: float, reached: float, points: Sequence[CurvePoint]) -> float | None:
    """Training seconds after which a figure now at `reached` should be at `target`, or None where that is a wild guess.

    The curve's second half is fitted as a power of time, bits = c * seconds^-k (arXiv 2001.08361), and carried on.
    """
    late = [p for p in points if p.seconds >= points[-1].seconds / 2]
    if len(late) < FEWEST_POINTS_TO_FIT or target <= 0:
        return None
    logs = np.log([[p.seconds, p.bits_per_byte] for p in late])
    slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    if slope >= 0 or (growth := math.log(target / reached) / slope) > math.log(LONGEST_GUESS):
        return None
    return points[-1].seconds * math.exp(growth)
