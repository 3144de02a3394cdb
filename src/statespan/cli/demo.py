"""`statespan demo`: train a small hybrid on Python's own source, measure it, and let it write."""

import argparse
from pathlib import Path

from statespan.cli.arguments import Command, positive_float, positive_int
from statespan.machine import usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=positive_float, default=5.0, help="of training (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and sample (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: the faster one here, by timing a few steps (default)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--prompt", default="def ", help="what the finished model continues (default: %(default)r)")
    parser.add_argument("--files", type=positive_int, metavar="N", help="use N source files only (default: all)")


def run(arguments: argparse.Namespace) -> None:
    from statespan.demo.run import DemoOptions, run_demo

    usable_device(arguments.device)
    run_demo(
        DemoOptions(
            output=arguments.output,
            minutes=arguments.minutes,
            seed=arguments.seed,
            precision=arguments.precision,
            device=arguments.device,
            prompt=arguments.prompt,
            max_files=arguments.files,
            command=arguments.command_line,
        )
    )


COMMAND = Command(
    "Train a small Jamba-style hybrid on the standard library's own source, compare its held-out bits per byte with\n"
    "gzip and xz, write a checkpoint and a one-page report with the loss curve, reload the checkpoint, let it write.",
    "statespan demo --minutes 5",
    add_arguments,
    run,
)
