"""Pages in Markdown: one an experiment, with tables, picture, command, machine and time, and an index of all."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from statespan.dataclass_io import from_plain
from statespan.lab.experiment import Check, Experiment, Findings, Setting, Table
from statespan.lab.picture import draw
from statespan.lab.results import Unit, read_units, results_path
from statespan.training.progress import duration

MARKS = {True: "yes", False: "NO", None: "not answered"}
PLACES = ("cpu", "h100")  # settings that a page has, or says are missing
HIDDEN = ("time", "device", "variants", "seeds")  # fields of a setting that the page tells in words


def write_page(experiment: Experiment[Any], folder: Path) -> Path:
    """Write NAME.md, and a picture NAME.SETTING.png for each setting that has results in `folder`."""
    parts = [f"# {experiment.title}\n", f"{experiment.claim}\n", f"Source: {experiment.source}\n"]
    missing: list[str] = []
    for name, setting in experiment.settings.items():
        units = read_units(results_path(folder, experiment.name, name))
        if units:
            parts.append(_section(experiment, name, units, folder))
        elif name in PLACES:
            missing.append(f"    statespan lab {experiment.name} --setting {name}    # {setting.time}")
    if missing:
        parts.append("## Not run here yet\n\n" + "\n".join(missing) + "\n")
    page = folder / f"{experiment.name}.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def findings_of(experiment: Experiment[Any], name: str, units: list[Unit]) -> Findings:
    """What the units of a setting show."""
    setting = from_plain(type(experiment.settings[name]), units[-1].setting)
    return experiment.report(setting, [row for unit in units for row in unit.labelled_rows()])


def _section(experiment: Experiment[Any], name: str, units: list[Unit], folder: Path) -> str:
    findings = findings_of(experiment, name, units)
    picture = f"{experiment.name}.{name}.png"
    draw(folder / picture, findings.plots)
    parts = [f"## {_place(name, units)}\n", _checks(findings.checks)]
    if name in experiment.notes:
        parts.append(f"{experiment.notes[name]}\n")
    ran = {unit.variant for unit in units}
    names = "; ".join(f"`{variant}`: {what}" for variant, what in experiment.variants.items() if variant in ran)
    parts += [f"![{experiment.title}]({picture})\n", f"Names: {names}.\n"]
    parts += [_table(table) for table in findings.tables]
    parts.append(_provenance(experiment.settings[name], units))
    return "\n".join(parts)


def _place(name: str, units: list[Unit]) -> str:
    """Where a setting ran, whatever it was made for."""
    gpus = dict.fromkeys(
        u.machine["processor"].split(", host ")[0] for u in units if ", host " in u.machine["processor"]
    )
    if gpus:
        cards = " and an ".join(gpus)
        return f"On an {cards}" if name in PLACES else f"Setting {name}, on an {cards}"
    return {"cpu": "On a CPU", "h100": "Larger, on a CPU"}.get(name, f"Setting {name}")


def _checks(checks: Iterable[Check]) -> str:
    rows = [f"| {check.text} | {check.ours} | {check.published} | {MARKS[check.passed]} |" for check in checks]
    return "\n".join(["| what must come out | here | published | came out |", "|---|---|---|---|", *rows, ""])


def _table(table: Table) -> str:
    lines = [f"**{table.title}**\n"] if table.title else []
    lines += ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(_cell(cell, table.digits) for cell in row) + " |" for row in table.rows]
    return "\n".join([*lines, ""])


def _cell(cell: str | float | None, digits: int) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.{digits}f}"


def _provenance(setting: Setting, units: list[Unit]) -> str:
    """Command, seeds, machine, time and versions."""
    fields = {key: value for key, value in units[-1].setting.items() if key not in HIDDEN}
    seeds: dict[tuple[int, ...], list[str]] = {}
    for variant in dict.fromkeys(unit.variant for unit in units):
        seeds.setdefault(tuple(sorted(unit.seed for unit in units if unit.variant == variant)), []).append(variant)
    told = [
        " ".join(map(str, found)) + (f" ({', '.join(names)})" if len(seeds) > 1 else "")
        for found, names in seeds.items()
    ]
    lines = [
        *_unique("command", (f"`{unit.command}`" for unit in units)),
        f"- seeds: {'; '.join(told)}",
        f"- time: {duration(sum(unit.seconds for unit in units))} in {len(units)} units{_side_by_side(units)}, "
        f"{duration(sum(unit.processor_s for unit in units))} of processor time; the setting is made for "
        f"{setting.time}",
        *_unique("machine", (f"{unit.machine['processor']}, {unit.machine['cores']}" for unit in units)),
        *_unique("versions", (unit.machine["versions"] for unit in units)),
        f"- finished: {max(unit.finished for unit in units)}",
        "- sizes: " + ", ".join(f"{key}={_plain(value)}" for key, value in fields.items()),
    ]
    return "\n".join([*lines, ""])


def _side_by_side(units: list[Unit]) -> str:
    most = max(unit.jobs for unit in units)
    return "" if most == 1 else f", up to {most} of them side by side"


def _unique(name: str, values: Iterable[str]) -> list[str]:
    return [f"- {name}: {value}" for value in dict.fromkeys(values)]


def _plain(value: Any) -> str:
    return "[" + " ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def write_index(folder: Path, experiments: Mapping[str, Experiment[Any]]) -> None:
    """Write index.md: every experiment with what came out in this folder."""
    lines = [
        "# The lab: claims of the papers, run again\n",
        "Every row is one command, `statespan lab NAME`; `statespan lab all` runs them all. Pages, tables and pictures",
        "are written by the command; the rows behind them lie beside them as JSON lines.\n",
        "Variants and seeds are independent: `--only VARIANT --seeds N --out FOLDER` runs some of them, and",
        "`--merge FOLDER --report` brings the results of several folders, or machines, onto one page.\n",
        "| experiment | claim | CPU | GPU |",
        "|---|---|---|---|",
    ]
    for name, experiment in experiments.items():
        there = (folder / f"{name}.md").exists()
        title = f"[{experiment.title}]({name}.md)" if there else experiment.title
        cells = [_came_out(experiment, setting, folder) for setting in PLACES]
        lines.append(f"| {title} (`{name}`) | {experiment.claim.split('. ')[0].rstrip('.')} | {' | '.join(cells)} |")
    lines += ["", "Every claim in its largest setting that has run:\n", "| | claim | here | published | came out |"]
    lines.append("|---|---|---|---|---|")
    lines += [row for experiment in experiments.values() for row in _claims(experiment, folder)]
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _claims(experiment: Experiment[Any], folder: Path) -> list[str]:
    """A row a check, of the largest setting that has results; what did not come out with the reason."""
    for name in reversed(PLACES):
        units = read_units(results_path(folder, experiment.name, name))
        if units:
            break
    else:
        return []
    rows: list[str] = []
    for check in findings_of(experiment, name, units).checks:
        mark = f"NO: {check.why}" if check.passed is False and check.why and name == "h100" else MARKS[check.passed]
        rows.append(f"| {experiment.title} | {check.text} | {check.ours} | {check.published} | {mark} |")
    return rows


def _came_out(experiment: Experiment[Any], name: str, folder: Path) -> str:
    units = read_units(results_path(folder, experiment.name, name))
    if not units:
        return f"not run; takes {experiment.settings[name].time}"
    checks = findings_of(experiment, name, units).checks
    answered = [check for check in checks if check.passed is not None]
    return f"{sum(bool(check.passed) for check in answered)} of {len(answered)} checks"
