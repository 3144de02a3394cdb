"""Run an experiment: the units that are missing, one after the other, each kept as soon as it is finished."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from statespan.dataclass_io import apply_overrides, to_plain
from statespan.errors import UnknownName, UserError
from statespan.lab.experiment import Experiment, Setting
from statespan.lab.pages import write_page
from statespan.lab.results import Unit, append_unit, merged, read_units, results_path, write_units
from statespan.machine import describe_machine
from statespan.training.progress import ProgressDisplay, duration

SHAPE = ("variants", "seeds", "device", "time")  # of a setting: which units run and where, not how large they are


@dataclass(frozen=True)
class LabOptions:
    """What the command line asks for."""

    setting: str = "cpu"
    folder: Path = Path("lab-output")
    seeds: int | None = None  # None: as many as the setting says
    only: tuple[str, ...] = ()  # variants; none: those of the setting
    assignments: tuple[str, ...] = ()  # key=value, fields of the setting
    merge: tuple[Path, ...] = ()  # folders whose units are taken over
    report_only: bool = False  # write pages from the units that are there
    command: str = "statespan lab"  # as it was typed


def run_experiment(experiment: Experiment[Any], options: LabOptions, display: ProgressDisplay | None = None) -> Path:
    """Run the units of `experiment` that are not in the folder yet, and write its page.

    Returns:
        The page.
    Raises:
        UserError: unknown setting or variant, sizes that cannot work, a folder that cannot be written or holds results
            of other sizes.
    """
    setting = choose_setting(experiment, options)
    prepare_folder(options.folder)
    path = results_path(options.folder, experiment.name, options.setting)
    others = (unit for folder in options.merge for unit in _units_of(folder, experiment, options.setting))
    units = merged(read_units(path), others)
    for unit in units:
        _check_sizes(unit, setting, path)
    if options.report_only and not units:
        raise UserError(f"no results of {experiment.name} in {options.folder}; run it without --report")
    write_units(path, units)  # without a line that an interruption cut off
    if not options.report_only:
        done = {(unit.variant, unit.seed) for unit in units}
        wanted = [(variant, seed) for seed in range(setting.seeds) for variant in setting.variants]
        with display or ProgressDisplay() as display:
            _run_units(experiment, setting, [w for w in wanted if w not in done], path, options.command, display)
    return write_page(experiment, options.folder)


def _units_of(folder: Path, experiment: Experiment[Any], setting: str) -> list[Unit]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder to merge")
    return read_units(results_path(folder, experiment.name, setting))


def choose_setting(experiment: Experiment[Any], options: LabOptions) -> Setting:
    """The setting with what the command line changes of it."""
    if options.setting not in experiment.settings:
        raise UnknownName(f"setting of {experiment.name}", options.setting, experiment.settings)
    setting = apply_overrides(experiment.settings[options.setting], options.assignments)
    if options.seeds is not None:
        setting = replace(setting, seeds=options.seeds)
    if options.only:
        setting = replace(setting, variants=options.only)
    experiment.check_variants(setting.variants)
    return setting


def has_results(experiment: Experiment[Any], options: LabOptions) -> bool:
    """Whether the folder, or one that is to be merged, has units of the setting."""
    folders = (options.folder, *options.merge)
    return any(results_path(folder, experiment.name, options.setting).exists() for folder in folders)


def prepare_folder(folder: Path) -> None:
    """Make the folder, or say in a line why it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from None


def sizes(setting: dict[str, Any]) -> dict[str, Any]:
    """The fields of a setting that rows depend on."""
    return {name: value for name, value in setting.items() if name not in SHAPE}


def _check_sizes(unit: Unit, setting: Setting, path: Path) -> None:
    before, now = sizes(unit.setting), sizes(to_plain(setting))
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{path} holds results with {name}={before.get(name)}, and now it is {value}; "
                "name another folder with --out"
            )


def _run_units(
    experiment: Experiment[Any],
    setting: Setting,
    wanted: Sequence[tuple[str, int]],
    path: Path,
    command: str,
    display: ProgressDisplay,
) -> None:
    started = time.perf_counter()
    for index, (variant, seed) in enumerate(wanted):
        before, worked = time.perf_counter(), time.process_time()

        def show(share: float, text: str, index: int = index, variant: str = variant, seed: int = seed) -> None:
            whole = (index + share) / len(wanted)
            elapsed = time.perf_counter() - started
            left = f"  {duration(elapsed / whole - elapsed)} left" if whole > 0 else ""
            display.show(experiment.name, whole, f"{variant}, seed {seed}: {text}{left}")

        show(0.0, "")
        rows = [dict(row) for row in experiment.run(setting, variant, seed, show)]
        seconds, processor_s = time.perf_counter() - before, time.process_time() - worked
        finished = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        machine = describe_machine(setting.device)
        append_unit(
            path, Unit(variant, seed, to_plain(setting), machine, command, finished, seconds, processor_s, rows)
        )
        display.say(f"{experiment.name}: {variant}, seed {seed}: {duration(seconds)}")
