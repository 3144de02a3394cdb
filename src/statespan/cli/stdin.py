"""What a user pipes in."""

import sys

from statespan.errors import UserError


def read_stdin() -> str:
    """All of stdin as text; UserError where it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 at byte {error.start}; give UTF-8 text") from None
