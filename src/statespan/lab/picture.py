"""Plots as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from statespan.lab.experiment import Line, Plot

PANEL = (6.2, 3.9)  # inches, the legend included
COLORS = (
    "#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#0a7f8c",
    "#bf3989", "#57606a", "#e16f24", "#24292f", "#79c0ff", "#a2c23a",
)  # fmt: skip


def draw(path: Path, plots: Sequence[Plot]) -> None:
    """Write a PNG with one panel a plot, at most three side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if len(plots) == 4 else min(len(plots), 3)
    rows = -(-len(plots) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    labels = dict.fromkeys(line.label for plot in plots for line in plot.lines)
    colors = {label: COLORS[index % len(COLORS)] for index, label in enumerate(labels)}  # the same in all panels
    for index, plot in enumerate(plots):
        _panel(figure.add_subplot(rows, columns, index + 1), plot, colors)
    if any(line.seeds for plot in plots for line in plot.lines):
        figure.supxlabel("pale: each seed, strong: their mean", fontsize=8, x=0.99, ha="right")
    figure.savefig(path, format="png")


def _panel(axes: Any, plot: Plot, colors: Mapping[str, str]) -> None:
    for line in plot.lines:
        if plot.names:
            axes.plot(line.x, line.y, "o", color=colors[line.label], markersize=6, label=line.label)
        else:
            _curve(axes, line, colors[line.label])
    if plot.names:
        axes.set_xticks(range(len(plot.names)), plot.names)
    elif plot.log_x:
        axes.set_xscale("log", base=2)
    else:
        axes.locator_params(axis="x", nbins=6)  # long numbers of steps do not meet
    if plot.log_y:
        axes.set_yscale("log")
    axes.set_title(plot.title, fontsize=10)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(alpha=0.3)
    if plot.lines:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False)


def _curve(axes: Any, line: Line, color: str) -> None:
    places = [index for index, value in enumerate(line.y) if value is not None]
    x, y = [line.x[i] for i in places], [line.y[i] for i in places]
    style, marker = ("--", None) if line.published else ("-", "o" if len(x) <= 40 else None)
    label = f"{line.label}, published" if line.published else line.label
    axes.plot(x, y, style, color=color, linewidth=1.3, marker=marker, markersize=3, label=label)
    for values in line.seeds:
        axes.plot(x, [values[i] for i in places], color=color, linewidth=0.8, alpha=0.35)
