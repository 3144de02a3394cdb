"""Run an experiment: the units that are missing, some side by side, each kept as soon as it is finished."""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from statespan.dataclass_io import apply_overrides, from_plain, to_plain
from statespan.errors import UnknownName, UserError
from statespan.lab.experiment import Experiment, Setting
from statespan.lab.pages import write_page
from statespan.lab.results import Unit, append_unit, merged, read_units, results_path, write_units
from statespan.machine import describe_machine
from statespan.training.progress import ProgressDisplay, duration

MOST_JOBS = 32  # streams that PyTorch has of a GPU
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
    jobs: int = 1  # units side by side
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
            wanted = [unit for unit in wanted if unit not in done]
            _Running(experiment, setting, wanted, path, options, display, _jobs(experiment, options)).run()
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


def _jobs(experiment: Experiment[Any], options: LabOptions) -> int:
    """How many units run side by side; what measures time runs alone."""
    if options.jobs > MOST_JOBS:
        raise UserError(f"--jobs can be {MOST_JOBS} at most: a GPU's streams; got {options.jobs}")
    return 1 if experiment.timed else options.jobs


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
    # A field that there was not then has its default.
    before, now = (sizes(to_plain(one)) for one in (from_plain(type(setting), unit.setting), setting))
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{path} holds results with {name}={before.get(name)}, and now it is {value}; "
                "name another folder with --out"
            )


@dataclass
class _Running:
    """The units of one experiment while they run, one after the other or side by side."""

    experiment: Experiment[Any]
    setting: Setting
    wanted: Sequence[tuple[str, int]]
    path: Path
    options: LabOptions
    display: ProgressDisplay
    jobs: int
    shares: list[float] = field(default_factory=list)  # done of each unit
    started: float = field(default_factory=time.perf_counter)
    failure: BaseException | None = None  # the first; it ends all
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """All of them; what breaks one ends the others at their next word of progress."""
        self.shares = [0.0] * len(self.wanted)
        if self.jobs == 1:
            for index in range(len(self.wanted)):
                self._unit(index)
            return
        with ThreadPoolExecutor(self.jobs, initializer=self._take_stream) as pool:
            units = [pool.submit(self._guarded, index) for index in range(len(self.wanted))]
            try:
                wait(units)
            except BaseException as error:  # Ctrl-C
                self._fail(error)
        if self.failure is not None:
            raise self.failure

    def _take_stream(self) -> None:
        """A stream for each thread, so that a GPU runs them at the same time."""
        device = torch.device(self.setting.device)
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))

    def _guarded(self, index: int) -> None:
        """A unit in a thread, which knows of a failure before it takes the next unit."""
        try:
            self._unit(index)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = self.failure or error

    def _unit(self, index: int) -> None:
        self._show(index, 0.0, "")
        variant, seed = self.wanted[index]
        clock = time.process_time if self.jobs == 1 else time.thread_time
        before, worked = time.perf_counter(), clock()
        rows = [dict(row) for row in self.experiment.run(self.setting, variant, seed, partial(self._show, index))]
        seconds, processor_s = time.perf_counter() - before, clock() - worked
        finished = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        unit = Unit(
            variant,
            seed,
            to_plain(self.setting),
            describe_machine(self.setting.device),
            self.options.command,
            finished,
            seconds,
            processor_s,
            rows,
            self.jobs,
        )
        with self.lock:
            append_unit(self.path, unit)
            self.shares[index] = 1.0
            self.display.say(f"{self.experiment.name}: {variant}, seed {seed}: {duration(seconds)}")

    def _show(self, index: int, share: float, text: str) -> None:
        if self.failure is not None:
            raise CancelledError
        variant, seed = self.wanted[index]
        with self.lock:
            self.shares[index] = share
            whole = sum(self.shares) / len(self.wanted)
            elapsed = time.perf_counter() - self.started
            left = f"  {duration(elapsed / whole - elapsed)} left" if whole > 0 else ""
            self.display.show(self.experiment.name, whole, f"{variant}, seed {seed}: {text}{left}")
