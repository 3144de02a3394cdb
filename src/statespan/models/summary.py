"""What `statespan inspect` prints: a config's layers, its parameters, and what a sequence costs at given lengths."""

from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from statespan.models.accounting import (
    count_layer_parameters,
    count_parameters,
    forward_flops,
    kv_bytes,
    kv_bytes_per_token,
    layer_forward_flops,
    layer_state_bytes,
    state_bytes,
    training_flops,
)
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

CONTEXT_LENGTHS = (4096, 32 * 1024, 256 * 1024)
PLAIN_WIDTH = 160  # columns when the output is no terminal: no row of ours is longer


def print_summary(
    config: ModelConfig,
    context_lengths: tuple[int, ...] = CONTEXT_LENGTHS,
    *,
    title: str = "",
    value_bytes: int = 2,
    console: Console | None = None,
) -> None:
    """Print the layer table, the parameters, and FLOPs and memory of a sequence at each context length.

    Args:
        config: of a preset or of a checkpoint.
        context_lengths: tokens of one sequence, each a row of the last table.
        title: the model's name, printed above.
        value_bytes: bytes of a cached value: 2 for 16-bit, 4 for float32. SSM states are float32 always.
        console: where to print; None: standard output. Outside a terminal the tables have no lines and no colours.

    Example:
        >>> from statespan.models.presets import preset
        >>> print_summary(preset("mamba-130m"), (1024,), title="mamba-130m")  # doctest: +ELLIPSIS
        mamba-130m
        ...
        total                           129,135,360 129.1 M
        ...
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, no_color=True)
    if title:
        console.print(title, style="bold", highlight=False)
    for index, table in enumerate(
        (
            _layer_table(config, context_lengths, value_bytes, console),
            _parameter_table(config, console),
            _sequence_table(config, context_lengths, value_bytes, console),
        )
    ):
        if index and not console.is_terminal:
            console.print()  # tables with lines bring their own space
        console.print(table)


@dataclass(frozen=True)
class LayerRun:
    """Equal neighbouring layers, and where the same run comes back at equal distances."""

    spec: LayerSpec
    start: int
    length: int
    distance: int = 0  # layers between two occurrences
    occurrences: int = 1

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.length * self.occurrences

    def __str__(self) -> str:
        firsts = [self.start + i * self.distance for i in range(self.occurrences)]
        spans = [str(first) if self.length == 1 else f"{first}-{first + self.length - 1}" for first in firsts]
        return ", ".join(spans if len(spans) <= 3 else [*spans[:2], ".. " + spans[-1]])


def fold_layers(layers: tuple[LayerSpec, ...]) -> list[LayerRun]:
    """The layer list in few rows: equal neighbours are one run, and a motif that repeats is written once.

    From the first layer on, the motif is taken that covers most layers a row.
    """
    rows: list[LayerRun] = []
    start = 0
    while start < len(layers):
        length, occurrences = _best_motif(layers, start)
        for run, run_start in _runs(layers[start : start + length]):
            rows.append(LayerRun(layers[start + run_start], start + run_start, run, length, occurrences))
        start += length * occurrences
    return rows


def _best_motif(layers: tuple[LayerSpec, ...], start: int) -> tuple[int, int]:
    """Length and number of occurrences of the motif from `start` on that covers most layers a row."""
    best, best_share = (1, 1), 0.0
    for length in range(1, (len(layers) - start) // 2 + 1):
        motif = layers[start : start + length]
        occurrences = 1
        while layers[start + occurrences * length : start + (occurrences + 1) * length] == motif:
            occurrences += 1
        share = length * occurrences / len(_runs(motif))
        if occurrences > 1 and share > best_share:
            best, best_share = (length, occurrences), share
    return best


def _runs(layers: tuple[LayerSpec, ...]) -> list[tuple[int, int]]:
    """Length and start of each run of equal neighbours."""
    runs: list[tuple[int, int]] = []
    start = 0
    for _, group in groupby(layers):
        length = len(list(group))
        runs.append((length, start))
        start += length
    return runs


def _layer_table(config: ModelConfig, context_lengths: tuple[int, ...], value_bytes: int, console: Console) -> Table:
    context = context_lengths[0] if context_lengths else 1
    flops = f"FLOPs\nat {length_text(context)}"
    columns = ("layers", "kind", "params\neach", "active", flops, "KV a\ntoken", "state")
    table = _table(console, columns, left=("layers", "kind"))
    for run in fold_layers(config.layers):
        parameters = count_layer_parameters(config, run.spec)
        alone = config.replace(layers=(run.spec,))
        table.add_row(
            str(run),
            f"{run.count} x {run.spec}",
            number_text(parameters.total),
            number_text(parameters.active),
            number_text(layer_forward_flops(config, run.spec, context)),
            bytes_text(kv_bytes_per_token(alone, value_bytes)),
            bytes_text(layer_state_bytes(config, run.spec, value_bytes)),
        )
    return table


def _parameter_table(config: ModelConfig, console: Console) -> Table:
    count = count_parameters(config)
    table = _table(console, ("parameters", "", ""), left=("parameters",))
    head = "embedding and head" + (" (one matrix)" if config.tie_embeddings else "")
    for name, value in (("total", count.total), ("active, a token", count.active), (head, count.embedding)):
        table.add_row(name, f"{value:,}", number_text(value))
    return table


def _sequence_table(config: ModelConfig, context_lengths: tuple[int, ...], value_bytes: int, console: Console) -> Table:
    columns = ("context", "FLOPs/token", "in training", "KV cache", "state", "both")
    table = _table(console, columns, left=())
    fixed = state_bytes(config, value_bytes)
    for context in context_lengths:
        cache = kv_bytes(config, context, value_bytes)
        table.add_row(
            length_text(context),
            number_text(forward_flops(config, context)),
            number_text(training_flops(config, context)),
            bytes_text(cache),
            bytes_text(fixed),
            bytes_text(cache + fixed),
        )
    return table


def _table(console: Console, columns: tuple[str, ...], left: tuple[str, ...]) -> Table:
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    table = Table(box=lines, highlight=False, pad_edge=False, collapse_padding=True)  # Jamba's fits 80 columns
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def number_text(value: int) -> str:
    """A count with its unit: 12110311296 is "12.11 B"."""
    return _scaled(value, 1000, ("", " K", " M", " B", " T"))


def bytes_text(value: int) -> str:
    """Bytes with their binary unit: 4294967296 is "4 GiB"."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def length_text(tokens: int) -> str:
    """A context length as people write it: 262144 is "256K"."""
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.4g}{units[power]}"
