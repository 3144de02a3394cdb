"""`statespan backends`: which backend runs each op on a device, and why the others do not."""

import argparse

from statespan.cli.arguments import Command
from statespan.cli.table import print_table
from statespan.machine import usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where the tensors lie: cpu, cuda, mps (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from statespan.ops.dispatch import explain
    from statespan.ops.tuning import table_in_use

    device = usable_device(arguments.device)
    print_table([("op", "backend", f"on {device}"), *explain(device)])
    if device.type == "cuda":
        print(f"\nblock sizes: {table_in_use(device)}")


COMMAND = Command(
    "Which backend runs each op ('auto' takes it), which others are ready, and why the rest cannot run.",
    "statespan backends --device cpu",
    add_arguments,
    run,
)
