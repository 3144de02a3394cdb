"""`statespan demo | train | generate | serve | convert | inspect | lab | tune | backends`: each calls one package.

Exit codes: 0, 2 for a mistake of the user's (one line on stderr), 130 when interrupted, 141 when the reader went away.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from statespan import __version__
from statespan.cli.arguments import Command
from statespan.cli.out_of_memory import out_of_memory
from statespan.errors import UnknownName, UserError

# Each name is a module of this package that holds COMMAND; it is imported when needed.
COMMANDS = {
    "demo": "train a small hybrid on Python's own source in minutes, and talk to it",
    "train": "train a model from a recipe",
    "generate": "continue a prompt with a saved model",
    "serve": "serve a saved model as OpenAI's API, with a playground",
    "convert": "rewrite a checkpoint in another format",
    "inspect": "layers, parameters, FLOPs and memory of a preset or checkpoint",
    "lab": "run a claim of the papers again: table, picture and page",
    "tune": "time the GPU kernels' block sizes here, and keep the best",
    "backends": "which backend runs each op here, and why not the others",
}

USAGE = "\n".join(
    [
        "usage: statespan COMMAND ...",
        "",
        "Train, save, reload and talk to models of the Mamba and Jamba family.",
        "",
        *(f"  {name:<10}{summary}" for name, summary in COMMANDS.items()),
        "",
        "statespan COMMAND --help explains a command; statespan --version prints the version.",
        "",
        "example:",
        "  statespan inspect jamba-v0.1 --context 262144",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        argv: the words after the program's name; None: those the program was started with.

    Example:
        >>> main(["--version"])
        statespan 0.1.0
        0
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("\nstatespan: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered has no reader; without this the interpreter complains about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return complain(f"{error.filename or 'the output'}: {error.strerror or error}")
    except RuntimeError as error:
        if (line := out_of_memory(error, *words[:1])) is None:
            raise
        return complain(line)
    return 0


def dispatch(argv: Sequence[str]) -> None:
    """Run the subcommand that `argv` names."""
    name, words = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("--help", "-h"):
        print(USAGE)
    elif name == "--version":
        print(f"statespan {__version__}")
    elif name not in COMMANDS:
        raise UnknownName("option of statespan" if name.startswith("-") else "command", name, _known(name))
    else:
        command = find_command(name)
        command.run(command.parse(name, words))


def find_command(name: str) -> Command:
    """The command called `name`, one of COMMANDS."""
    return import_module(f"statespan.cli.{name}").COMMAND


def _known(name: str) -> list[str]:
    return ["--help", "--version"] if name.startswith("-") else list(COMMANDS)


def complain(message: str) -> int:
    """Print one line on stderr and return the exit code of a user's mistake."""
    print(f"statespan: {' '.join(message.split())}", file=sys.stderr)
    return 2
