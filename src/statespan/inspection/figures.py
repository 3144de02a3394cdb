"""The pictures of an inspection, drawn by matplotlib (imported when the first is drawn)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from statespan.inspection.views import LayerView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS = 64  # tokens that are written out under a picture; beyond, their numbers
MOST_HEADS = 15  # attention maps beside their mean
SPAN = 1e-3  # of the largest: where the colours of who-takes-from-whom begin
TEXT_COLORS, EXPERT_COLORS = "viridis", "tab20"


def draw_layer(path: Path, view: LayerView, texts: Sequence[str]) -> None:
    """One layer: who takes from whom, step sizes by channel, how long its states last, the router's scores."""
    panels = [
        draw
        for draw, value in (
            (_draw_mixing, view.mixing),
            (_draw_channels, view.dt),
            (_draw_memory, view.memory),
            (_draw_scores, view.scores),
        )
        if value is not None
    ]
    heads = 0 if view.mixing is None or len(view.mixing) == 1 else min(len(view.mixing), MOST_HEADS)
    columns = len(panels) if len(panels) < 4 else 2  # narrow enough to be read on a page
    panel_rows, head_rows = -(-len(panels) // columns), -(-heads // 5)
    figure = _figure(max(5.2 * columns, 8.0 if heads else 0.0), 4.6 * panel_rows + 2.2 * head_rows)
    rows = figure.add_gridspec(panel_rows + head_rows, 1, height_ratios=[4.6] * panel_rows + [2.2] * head_rows)
    places = [rows[i].subgridspec(1, columns if i < panel_rows else 5) for i in range(panel_rows + head_rows)]
    for place, draw in enumerate(panels):
        draw(figure.add_subplot(places[place // columns][place % columns]), view, texts)
    for head in range(heads):
        axes = figure.add_subplot(places[panel_rows + head // 5][head % 5])
        assert view.mixing is not None
        _image(axes, _row_shares(view.mixing[head]), f"head {head}", logarithmic=True, bar=False)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(f"layer {view.index}: {view.spec}")
    figure.savefig(path, format="png")


def draw_dt(path: Path, dt: dict[int, Tensor], texts: Sequence[str]) -> None:
    """The mean step size [t] of each layer, as a heat map of layers over tokens."""
    layers = list(dt)
    figure = _figure(_width(len(texts)), 1.6 + 0.22 * len(layers))
    axes = figure.add_subplot()
    values = np.stack([dt[layer].numpy() for layer in layers])
    _image(axes, values, "mean step size dt of each layer: what is written into the state", logarithmic=True)
    axes.set_ylabel("layer")
    _ticks(axes, "y", [str(layer) for layer in layers])
    _token_ticks(axes, texts)
    figure.savefig(path, format="png")


def draw_memory(path: Path, memory: dict[int, Tensor], num_tokens: int) -> None:
    """How many tokens the states of each layer last: 5 to 95% as a thin line, the middle half thick, the median."""
    figure = _figure(max(6.0, 2 + 0.28 * len(memory)), 4.5)
    axes = figure.add_subplot()
    for place, values in enumerate(memory.values()):
        low, lower, median, upper, high = np.percentile(_finite(values), [5, 25, 50, 75, 95])
        axes.vlines(place, low, high, color="#1f6feb", linewidth=1.2)
        axes.vlines(place, lower, upper, color="#1f6feb", linewidth=6)
        axes.plot(place, median, "o", color="white", markeredgecolor="#1f6feb", markersize=6)
    axes.axhline(num_tokens, color="#888888", linestyle="--", linewidth=1, label=f"this text: {counted(num_tokens)}")
    axes.set_yscale("log")
    _ticks(axes, "x", [str(layer) for layer in memory])
    axes.set_xlabel("layer")
    axes.set_ylabel("tokens until 1/e of a state is left")
    axes.set_title("Memory of the states: 5 to 95%, middle half, median")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, format="png")


def draw_experts(path: Path, choices: dict[int, Tensor], num_experts: int, texts: Sequence[str]) -> None:
    """The first choice [t] of each layer's router, as a map of layers over tokens."""
    from matplotlib import colormaps

    figure = _figure(_width(len(texts)), 1.8 + 0.3 * len(choices))
    axes = figure.add_subplot()
    values = np.stack([choice.numpy() for choice in choices.values()])
    colors = colormaps[EXPERT_COLORS].resampled(min(num_experts, 20))
    image = axes.imshow(
        values % 20, aspect="auto", interpolation="nearest", cmap=colors, vmin=-0.5, vmax=colors.N - 0.5
    )
    figure.colorbar(image, ax=axes, ticks=range(colors.N), label="expert" if num_experts <= 20 else "expert, modulo 20")
    axes.set_title("each token's first expert")
    axes.set_ylabel("layer")
    _ticks(axes, "y", [str(layer) for layer in choices])
    _token_ticks(axes, texts)
    figure.savefig(path, format="png")


def draw_logprobs(path: Path, logprobs: Tensor, texts: Sequence[str]) -> None:
    """How surprising each token was, in bits."""
    figure = _figure(_width(len(texts)), 3.2)
    axes = figure.add_subplot()
    bits = -logprobs.numpy() / np.log(2)
    axes.bar(range(len(bits)), np.nan_to_num(bits), color="#c2571a", width=0.9)
    axes.set_xlim(-0.5, len(bits) - 0.5)
    axes.set_ylabel("-log2 p, bits")
    axes.set_title("surprise of each token")
    _token_ticks(axes, texts)
    figure.savefig(path, format="png")


def _draw_mixing(axes: "Axes", view: LayerView, texts: Sequence[str]) -> None:
    assert view.mixing is not None
    attention = view.spec.mixer == "attention"
    title = f"attention, mean of {len(view.mixing)} heads" if attention else "hidden attention, mean |alpha|"
    shares = np.mean([_row_shares(matrix) for matrix in view.mixing], axis=0)
    _image(axes, shares, f"{title}\n(each row sums to 1)", logarithmic=True)
    axes.set_ylabel("token that takes")
    _token_ticks(axes, texts, most=40)
    axes.set_xlabel("token that is taken from")


def _draw_channels(axes: "Axes", view: LayerView, texts: Sequence[str]) -> None:
    assert view.dt is not None
    kind = "head" if view.spec.mixer == "mamba2" else "channel"
    order = view.dt.mean(0).argsort()
    _image(axes, view.dt[:, order].T.numpy(), f"step size dt of each {kind}", logarithmic=True)
    axes.set_ylabel(f"{kind}, sorted by mean dt")
    _token_ticks(axes, texts, most=40)


def _draw_memory(axes: "Axes", view: LayerView, texts: Sequence[str]) -> None:
    assert view.memory is not None
    values = np.clip(_finite(view.memory), 1e-2, None)
    edges = np.geomspace(values.min() * 0.9, values.max() * 1.1, 40)
    counts, _, _ = axes.hist(values, bins=edges.tolist(), color="#1f6feb", label="states")
    room = 1.25  # above the bars, for the legend
    axes.set_ylim(0, room * float(np.max(counts)))
    label = f"this text: {counted(len(texts))}"
    axes.axvline(len(texts), ymax=1 / room, color="#888888", linestyle="--", linewidth=1, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("tokens until 1/e is left")
    axes.set_ylabel("number of states")
    axes.set_title("memory of the states")
    axes.legend(loc="upper left", fontsize="small")


def _draw_scores(axes: "Axes", view: LayerView, texts: Sequence[str]) -> None:
    assert view.scores is not None and view.experts is not None
    _image(axes, view.scores.T.numpy(), "router's scores, the chosen experts marked")
    tokens = np.repeat(np.arange(len(view.experts)), view.experts.shape[1])
    axes.plot(tokens, view.experts.flatten().numpy(), ".", color="#ff6a3d", markersize=4)
    axes.set_ylabel("expert")
    _ticks(axes, "y", [str(expert) for expert in range(view.scores.shape[1])])
    _token_ticks(axes, texts, most=40)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _image(axes: "Axes", values: np.ndarray, title: str, *, logarithmic: bool = False, bar: bool = True) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    positive = values[values > 0]
    norm = None
    if logarithmic and len(positive):
        low, high = float(positive.min()), float(positive.max())
        norm = LogNorm(max(low, high * SPAN) if high > low else low / 2, high)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=TEXT_COLORS, norm=norm)
    for axis in (axes.xaxis, axes.yaxis):  # of tokens, channels, layers: whole numbers
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_facecolor("#440154")  # the lowest colour, where a logarithm has none
    axes.set_title(title)
    if bar:
        axes.figure.colorbar(image, ax=axes)


def _row_shares(matrix: Tensor) -> np.ndarray:
    """The sizes of [t s], each row divided by its sum."""
    sizes = matrix.abs()
    return (sizes / sizes.sum(1, keepdim=True).clamp(min=1e-300)).numpy()


def _token_ticks(axes: "Axes", texts: Sequence[str], most: int = MOST_LABELS) -> None:
    if len(texts) <= most:
        axes.set_xticks(range(len(texts)), [_label(text) for text in texts], rotation=90, family="monospace")
    else:
        axes.set_xlabel("token")


def _label(text: str) -> str:
    """A token under a picture: visible blanks, and no mathematics in dollar signs."""
    shown = "".join("\N{OPEN BOX}" if c == " " else c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)
    return (shown or "\N{MIDDLE DOT}").replace("$", r"\$")


def _ticks(axes: "Axes", side: str, labels: list[str]) -> None:
    step = -(-len(labels) // 40)
    getattr(axes, f"set_{side}ticks")(range(0, len(labels), step), labels[::step])


def _width(num_tokens: int) -> float:
    return max(7.0, 2 + 0.17 * min(num_tokens, MOST_LABELS))


def counted(num_tokens: int) -> str:
    """The number of tokens in words."""
    return f"{num_tokens} token{'' if num_tokens == 1 else 's'}"


def _finite(values: Tensor) -> np.ndarray:
    """Lengths as a plot can show them: a state that never forgets counts as a billion tokens."""
    return values.flatten().clamp(max=1e9).numpy()
