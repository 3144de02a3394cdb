"""Rows of a measurement: printed as a table and appended to results/NAME.csv with machine, versions and commit."""

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. Ratios compare figures of one run on one machine; absolute values drift with the machine's load."""

    task: str  # what was measured, with its shape
    system: str  # "statespan float32", "transformers", ...
    value: float  # median
    unit: str  # "ms", "tok/s", "MiB"
    spread: float  # (largest - smallest) / median over the repetitions
    note: str = ""


def versions(packages: Sequence[str]) -> str:
    """ "name version" of each installed package."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """Processor, threads used and operating system, after the GPU where there is one."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
        model += "".join(f" {flag}" for flag in ("avx2", "avx512f", "amx_bf16") if flag in flags)
    except (OSError, StopIteration):
        pass
    gpu = f"{torch.cuda.get_device_name()}; " if torch.cuda.is_available() else ""
    return f"{gpu}{model}, {torch.get_num_threads()} threads, {platform.system()}"


def commit() -> str:
    """The short commit, with + when files differ from it."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def report(name: str, rows: Sequence[Row], packages: Sequence[str]) -> None:
    """Print `rows` and append them to results/`name`.csv."""
    table = Table(title=f"{name}: {machine()}; {versions(packages)}")
    for field in fields(Row):
        table.add_column(field.name, justify="right" if field.name in ("value", "spread") else "left")
    for row in rows:
        table.add_row(row.task, row.system, f"{row.value:,.4g}", row.unit, f"{row.spread:.0%}", escape(row.note))
    Console(width=160).print(table)
    context = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(packages),
    }
    path = RESULTS / f"{name}.csv"
    RESULTS.mkdir(exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)] + list(context), lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            values = asdict(row) | {"value": f"{row.value:.5g}", "spread": f"{row.spread:.3f}"}
            writer.writerow(values | context)
