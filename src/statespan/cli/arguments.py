"""The command line's parser: argparse with its errors in one line that offers the nearest known name."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from statespan.errors import UnknownName, UserError


@dataclass(frozen=True)
class Command:
    """A subcommand: what `--help` says, which arguments it takes, and the function that runs it."""

    summary: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    rest: str | None = None  # the list argument that words between and after options belong to

    def parse(self, name: str, argv: Sequence[str]) -> argparse.Namespace:
        """The words after the subcommand `name`, checked; `.command_line` is the whole as it can be typed again."""
        parser = Parser(f"statespan {name}", self.summary, self.example)
        self.add_arguments(parser)
        arguments = parser.parse_all(argv, self.rest)
        arguments.command_line = shlex.join(["statespan", name, *argv])
        return arguments


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError where argparse would print its usage and exit."""

    def __init__(self, prog: str, summary: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_all(self, argv: Sequence[str], rest: str | None = None) -> argparse.Namespace:
        """Parse `argv`; every word must be used. Unknown and abbreviated options are told before missing arguments are.

        argparse fills a list argument from one stretch of words only; further stretches go to the list called `rest`.
        """
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in argv:
            if word == "--":
                break
            name = word.partition("=")[0]
            if word.startswith("--") and name not in known:
                raise UnknownName(f"option of {self.prog}", name, known)
        arguments, unused = self.parse_known_args(argv)
        if rest is not None:
            getattr(arguments, rest).extend(word for word in unused if not word.startswith("-"))
            unused = [word for word in unused if word.startswith("-")]
        if unused:
            self.error(f"unexpected argument {unused[0]!r}")
        return arguments


def positive_int(text: str) -> int:
    """A whole number of at least 1, for `type=`."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0, for `type=`."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


# argparse names the type in "invalid ... value".
positive_int.__name__, positive_float.__name__ = "whole number", "number"
