"""The figures of the README and of docs stand in benchmarks/results, in rows of the command beside them."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.,^/])\d[\d,]*(?:\.\d+)?(?![\w^])")
SCALES = (1, 1000, 1 / 1000, 1 / 1024, 100)  # s and ms, MiB and GiB, shares and %
STORED = 5e-5  # rows keep five digits


@cache
def measured(name: str) -> frozenset[float]:
    """All numbers of results/`name`.csv: figures, spreads, and what the notes say."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return frozenset(
        value
        for row in rows
        for value in (float(row["value"]), float(row["spread"]), *map(number, NUMBER.findall(row["note"])))
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


def precision(text: str) -> float:
    """Half of the last digit that counts: 22,840 is known to 5, 0.53 to 0.005."""
    digits = text.replace(",", "").rstrip(",")
    if "." in digits:
        return 0.5 * 10.0 ** -len(digits.partition(".")[2])
    zeros = len(digits) - len(digits.rstrip("0"))
    return 0.5 * 10.0 ** min(zeros, max(0, len(digits) - 2))


def stands_in(text: str, values: frozenset[float]) -> bool:
    value, tolerance = number(text), precision(text)
    return any(abs(x * scale - value) <= max(tolerance * 1.01, STORED * value) for x in values for scale in SCALES)


def sources(text: str) -> set[str]:
    """What the commands in a text, such as `python -m benchmarks.gpu_models train`, have written, and their names."""
    found: set[str] = set()
    for module, *words in map(str.split, re.findall(r"benchmarks\.([\w -]+)", text)):
        device = module.partition("_")[0]
        found |= {module, *(f"{device}_{word}" for word in words)}
    return found


def figures_of(page: str) -> list[tuple[str, str, frozenset[float]]]:
    """(what, figure as it is written, numbers that it may be) of all table cells that a benchmark stands behind."""
    found: list[tuple[str, str, frozenset[float]]] = []
    for section in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        above = sources(section)
        for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
            headers, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
            before: set[str] = set()
            for what, *cells in lines:
                before = sources(cells[-1]) or (before if cells[-1] == "the same" else set())
                names = before or above
                if "`make" in cells[-1] or not names:
                    continue
                kept = [measured(name) for name in names if (RESULTS / f"{name}.csv").exists()]
                peers = [constants(name) for name in names if (ROOT / "benchmarks" / f"{name}.py").exists()]
                values = frozenset[float]().union(*kept, *peers)
                texts = [cell for header, cell in zip(headers[1:], cells, strict=True) if header != "ratio"]
                texts = [cell for cell in texts if "benchmarks." not in cell and "by arithmetic" not in cell]
                found += [(what, text, values) for cell in texts for text in NUMBER.findall(cell)]
    return found


@cache
def constants(module: str) -> frozenset[float]:
    """Numbers of a benchmark's source that have a fraction or at least four digits: what peers reached elsewhere."""
    source = (ROOT / "benchmarks" / f"{module}.py").read_text(encoding="utf-8")
    return frozenset(float(text.replace("_", "")) for text in re.findall(r"\b\d+\.\d+\b|\b\d[\d_]{3,}\b", source))


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md", "docs/quantization.md", "docs/serving.md"])
def test_every_figure_was_measured(page: str) -> None:
    found = figures_of(page)
    assert len(found) >= 20
    wrong = [f"{what}: {text}" for what, text, values in found if not stands_in(text.rstrip(","), values)]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "value", "same"),
    [
        ("22,840", 22836.0, True),
        ("22,840", 22846.0, False),
        ("0.53", 0.528, True),
        ("0.53", 0.536, False),
        ("8.6", 8806.4, True),  # GiB of MiB
        ("74", 0.744, True),  # per cent
        ("1,441,792", 1.4418e6, True),
        ("468", 469.2, False),
    ],
)
def test_figures_are_compared_as_they_are_rounded(text: str, value: float, same: bool) -> None:
    assert stands_in(text, frozenset([value])) == same
