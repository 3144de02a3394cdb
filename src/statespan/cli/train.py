"""`statespan train`: train a model from a recipe."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from statespan.cli.arguments import Command
from statespan.cli.table import print_table
from statespan.machine import usable_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="a recipe's name, or file.py:function; without it they are listed"
    )
    parser.add_argument(
        "assignments", metavar="key=value", nargs="*", help="fields of the recipe's config; --dry-run shows them all"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in DIR")
    parser.add_argument("--dry-run", action="store_true", help="print the config that would be trained, and stop")


def run(arguments: argparse.Namespace) -> None:
    from statespan.recipes import load_recipe, recipes
    from statespan.training import train

    if arguments.recipe is None:
        print_table([("recipe", "what it is"), *recipes().items()])
        return
    config = load_recipe(arguments.recipe).override(arguments.assignments)
    if arguments.dry_run:
        print_keys(config.to_dict())
        return
    usable_device(config.run.device)
    folder = arguments.run or Path("runs") / arguments.recipe.rpartition(":")[2]
    result = train(config, folder, resume=arguments.resume)
    if result.interrupted_by is not None:
        raise KeyboardInterrupt
    print(f"{result.checkpoint}: {result.step} steps, {result.num_tokens:,} tokens in {result.seconds:.1f} s")
    if (held_out := result.held_out) is not None:
        print(f"held-out text: {held_out.bits_per_byte:.4f} bits per byte of {held_out.num_bytes:,} bytes")


def print_keys(values: Mapping[str, Any], prefix: str = "") -> None:
    """Every key with its value, as it is given on the command line."""
    for name, value in values.items():
        if isinstance(value, dict):
            print_keys(value, f"{prefix}{name}.")
        else:
            print(f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}")


COMMAND = Command(
    "Train a model from a recipe, a Python function that returns the whole config. Progress goes to stderr.",
    "statespan train mambabyte_tiny_cpu data.train=book.txt run.max_steps=500 --run runs/book",
    add_arguments,
    run,
    rest="assignments",
)
