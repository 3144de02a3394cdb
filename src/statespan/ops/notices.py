"""What Statespan says without being asked: one line on stderr."""

import sys

_said: set[str] = set()


def say(text: str) -> None:
    """Print the line at once."""
    print(f"statespan: {text}", file=sys.stderr, flush=True)


def say_once(about: str, text: str) -> None:
    """Print the line unless this process has said one about the same before."""
    if about not in _said:
        _said.add(about)
        say(text)
