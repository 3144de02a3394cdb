"""`statespan convert`: rewrite a checkpoint in another format."""

import argparse

from statespan.cli.arguments import Command
from statespan.cli.checkpoint_path import checkpoint_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of a checkpoint in any format, or of a training run")
    parser.add_argument("target", metavar="TARGET", help="folder to write")
    parser.add_argument(
        "--format",
        choices=("statespan", "transformers"),
        default="statespan",
        help="transformers: files that it can load (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    import statespan

    statespan.convert(checkpoint_path(arguments.source), arguments.target, format=arguments.format)
    print(f"{arguments.target}: written in the {arguments.format} format")


COMMAND = Command(
    "Rewrite a checkpoint in another format. The format of SOURCE is found out.",
    "statespan convert runs/book book-transformers --format transformers",
    add_arguments,
    run,
)
