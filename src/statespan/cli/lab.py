"""`statespan lab`: claims of the papers, run again."""

import argparse
import os
from pathlib import Path

from statespan.cli.arguments import Command, positive_int
from statespan.cli.table import print_table
from statespan.machine import usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="an experiment, or all of them: all; without it they are listed"
    )
    parser.add_argument(
        "assignments", metavar="key=value", nargs="*", help="fields of the setting, such as steps=500; --dry-run shows"
    )
    parser.add_argument("--setting", default="cpu", help="cpu, h100, or tiny to try it out (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("lab-output"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=positive_int, help="run seeds 0 to N-1 (default: the setting's)", metavar="N")
    parser.add_argument(
        "--only", action="append", default=[], metavar="VARIANT", help="run this variant only; may be repeated"
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        default=1,
        metavar="N",
        help="train N variants and seeds side by side on the device; results are the same (default: %(default)s)",
    )
    parser.add_argument(
        "--merge", action="append", type=Path, default=[], metavar="DIR", help="take over results of another folder"
    )
    parser.add_argument("--report", action="store_true", help="write the pages from the results there are, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the setting that would be run, and stop")


def run(arguments: argparse.Namespace) -> None:
    from statespan.dataclass_io import to_plain
    from statespan.lab.pages import write_index
    from statespan.lab.registry import EXPERIMENTS, find_experiment
    from statespan.lab.session import LabOptions, choose_setting, has_results, run_experiment

    # Read when the GPU is first used: with fewer queues than units, streams wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if arguments.name is None:
        print_table([("experiment", "what it is"), *((name, e.title) for name, e in EXPERIMENTS.items())])
        return
    chosen = list(EXPERIMENTS.values()) if arguments.name == "all" else [find_experiment(arguments.name)]
    options = LabOptions(
        setting=arguments.setting,
        folder=arguments.out,
        seeds=arguments.seeds,
        only=tuple(arguments.only),
        assignments=tuple(arguments.assignments),
        merge=tuple(arguments.merge),
        report_only=arguments.report,
        jobs=arguments.jobs,
        command=arguments.command_line,
    )
    for experiment in chosen:
        setting = choose_setting(experiment, options)
        if arguments.name == "all" and arguments.report and not has_results(experiment, options):
            continue
        if arguments.dry_run:
            print(f"# {experiment.name}", *(f"{key}={value}" for key, value in to_plain(setting).items()), sep="\n")
            continue
        if not arguments.report:
            usable_device(setting.device)
        print(run_experiment(experiment, options))
        write_index(arguments.out, EXPERIMENTS)


COMMAND = Command(
    "Run an experiment of the lab again: rows, table, picture and page go to a folder. What was finished there before\n"
    "is kept, so that an interrupted run goes on. Progress goes to stderr.",
    "statespan lab selective_copying --setting cpu --out lab-output",
    add_arguments,
    run,
    rest="assignments",
)
