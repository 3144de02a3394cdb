"""The demo's one-page report: a single HTML file that holds the picture, and the same numbers as JSON."""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from statespan.dataclass_io import to_plain
from statespan.demo.corpus import EXCLUSIONS, CompressedSizes
from statespan.demo.curve import Level


@dataclass(frozen=True)
class DemoResult:
    """Everything that a report says."""

    command: str
    seed: int
    train_files: int
    train_bytes: int
    held_out_files: int
    sizes: CompressedSizes
    bits_per_byte: float  # of the model on the held-out files
    evaluation_s: float
    training_s: float
    steps: int
    trained_bytes: int
    seconds_to_beat_gzip: float | None  # training seconds that should do it, where it missed and a guess can be made
    precision: str
    parameters: int
    active_parameters: int
    config: Mapping[str, Any]  # of the run
    machine: Mapping[str, str]
    prompt: str
    completion: str
    finished: str  # date and time

    @property
    def gzip_bits(self) -> float:
        """Bits per byte of gzip -9."""
        return self.sizes.bits_per_byte(self.sizes.gzip)

    @property
    def xz_bits(self) -> float:
        """Bits per byte of xz -9."""
        return self.sizes.bits_per_byte(self.sizes.xz)

    def levels(self) -> list[Level]:
        """The held-out figures as lines of the picture."""
        return [
            Level("gzip -9, held-out files", self.gzip_bits, "#d1242f"),
            Level("xz -9, held-out files", self.xz_bits, "#9a6700"),
            Level("this model, held-out files", self.bits_per_byte, "#1a7f37"),
        ]

    def verdict(self) -> str:
        """One sentence: how the model compares with gzip -9, and what would help where it misses."""
        text = f"{self.bits_per_byte:.3f} bits per byte on held-out files; gzip -9 needs {self.gzip_bits:.3f}"
        text += f" and xz -9 {self.xz_bits:.3f}: the model "
        if self.bits_per_byte < self.gzip_bits:
            saved = 1 - self.bits_per_byte / self.gzip_bits
            beaten = "both" if self.bits_per_byte < self.xz_bits else "gzip"
            return text + f"beats {beaten}, and is {saved:.0%} smaller than gzip."
        text += f"misses gzip by {self.bits_per_byte - self.gzip_bits:.3f} bits per byte. "
        if self.seconds_to_beat_gzip is None:
            return text + "Its curve is too short or flat to say what time would close it."
        return text + f"The curve, carried on, meets gzip after about {self.seconds_to_beat_gzip / 60:.1f} minutes."


def write_results(path: Path, result: DemoResult) -> None:
    """Write the numbers as JSON."""
    values = to_plain(result) | {"gzip_bits_per_byte": result.gzip_bits, "xz_bits_per_byte": result.xz_bits}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_report(path: Path, result: DemoResult, picture: Path) -> None:
    """Write the page, self-contained: the picture is in it."""
    image = base64.b64encode(picture.read_bytes()).decode()
    path.write_text(_page(result, image), encoding="utf-8")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
h1 { font-size: 1.5rem; margin-bottom: 0.2rem } h2 { font-size: 1.1rem; margin: 1.4rem 0 0.4rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #d8dee4 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
img { width: 100% } pre { background: #f6f8fa; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem }
.prompt { font-weight: bold; color: #1f6feb } .lead { font-size: 1.05rem } small { color: #59636e }
"""


def _page(result: DemoResult, image: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Statespan demo</title><style>{STYLE}</style></head><body>
<h1>Statespan demo</h1>
<small>{escape(result.finished)} &middot; <code>{escape(result.command)}</code></small>
<p class="lead">{escape(result.verdict())}</p>
{_comparison(result)}
<img alt="Bits per byte over training time" src="data:image/png;base64,{image}">
<h2>What it writes after <code>{escape(result.prompt)}</code></h2>
<pre><span class="prompt">{escape(result.prompt)}</span>{escape(result.completion)}</pre>
<h2>The run</h2>
{_table(_facts(result))}
<p><small>How it is counted: the model reads each held-out file from its beginning with an empty state, carries the
state through the file, and pays -log2 of the probability it gave to each byte; the first byte of a file costs 8 bits.
gzip and xz compress all held-out files in one stream, so they may look back into earlier files; that favours them.
The model's weights are not counted, nor are the programs gzip and xz.
Text: the running Python's standard library, {escape(EXCLUSIONS)}.</small></p>
<details><summary>Configuration</summary>
<pre>{escape(_compact(result.config))}</pre></details>
</body></html>
"""


def _comparison(result: DemoResult) -> str:
    rows = [
        ("this model", round(result.bits_per_byte * result.sizes.original / 8), result.bits_per_byte),
        ("gzip -9", result.sizes.gzip, result.gzip_bits),
        ("xz -9", result.sizes.xz, result.xz_bits),
    ]
    head = (
        f"<tr><th>{result.sizes.original:,} held-out bytes</th>"
        '<th class="number">become bytes</th><th class="number">bits per byte</th></tr>'
    )
    body = "".join(
        f'<tr><td>{name}</td><td class="number">{size:,}</td><td class="number">{bits:.3f}</td></tr>'
        for name, size, bits in rows
    )
    return f"<table>{head}{body}</table>"


def _facts(result: DemoResult) -> Iterable[tuple[str, str]]:
    held_out, trained = result.sizes.original, result.trained_bytes
    yield "model", f"{result.parameters:,} parameters, {result.active_parameters:,} active per byte"
    yield "training text", f"{result.train_files:,} files, {result.train_bytes:,} bytes"
    yield "held-out text", f"{result.held_out_files:,} files, {held_out:,} bytes, drawn with seed {result.seed}"
    yield (
        "training",
        f"{result.training_s:,.1f} s, {result.steps:,} steps, {trained:,} bytes ({trained / result.train_bytes:.2f} of "
        f"the text), {trained / result.training_s:,.0f} bytes/s",
    )
    yield "arithmetic", result.precision
    yield "evaluation", f"{result.evaluation_s:.1f} s, {held_out / result.evaluation_s:,.0f} bytes/s"
    yield from result.machine.items()


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "<table>" + "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows) + "</table>"


def _compact(config: Mapping[str, Any]) -> str:
    """One line a field of each section."""
    return "\n".join(
        f"{section}.{name} = {json.dumps(value)}"
        for section, values in config.items()
        for name, value in values.items()
    )
