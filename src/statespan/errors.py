"""Errors that a user can cause, each told in one line: what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. The command line prints it as one line and exits with 2."""


class UnknownName(UserError):
    """A name that is none of the known ones; the message offers the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        options = sorted(known)
        bare = {option.lstrip("-"): option for option in options}  # dashes alone make no option a near one
        near = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.5)
        hint = f"did you mean {bare[near[0]]!r}?" if near else "known: " + ", ".join(options)
        super().__init__(f"unknown {kind}: {name!r}; {hint}")


class BackendUnavailable(UserError):
    """A backend that was asked for by name cannot run here; the message says why."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file, tensor or field."""


class DataError(UserError):
    """Training or evaluation data that cannot be used; the message names the file or the lengths."""


class NonFiniteLoss(UserError):
    """Training met a loss that is not a number; the message names the step and the first bad layer."""


def first_line(error: BaseException | str, width: int = 160) -> str:
    """What a library's error says, cut to a part of one line; its kind where it says nothing."""
    line = str(error).strip().split("\n", 1)[0].strip() or type(error).__name__
    return line if len(line) <= width else line[: width - 3] + "..."
