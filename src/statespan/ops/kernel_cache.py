"""Where compiled kernels are kept on disk, whatever compiled them."""

import contextlib
import os
import secrets
import sys
from pathlib import Path

from statespan.ops.notices import say_once


def cache_directory() -> Path | None:
    """Where object code is kept: NUMBA_CACHE_DIR, else the user's cache folder; None where there can be no folder."""
    try:
        if os.environ.get("NUMBA_CACHE_DIR"):
            root = Path(os.environ["NUMBA_CACHE_DIR"])
        elif sys.platform == "win32":
            root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            root = Path.home() / "Library" / "Caches"
        else:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        (root / "statespan").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody's home
        return None
    return root / "statespan"


def store(path: Path, code: bytes) -> None:
    """Write so that another thread or process reads all of it or nothing. A full disk costs only the cache."""
    temporary = path.with_suffix(f".{secrets.token_hex(8)}")  # containers that share a folder have equal process ids
    try:
        temporary.write_bytes(code)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def announce(kernel: str, path: Path | None) -> None:
    """A word on the screen while a kernel compiles; one for all its forms."""
    kept = "not cached: no folder to write to, set NUMBA_CACHE_DIR"
    if path is not None and os.access(path.parent, os.W_OK):
        kept = f"cached in {path.parent}"
    text = f"compiling {kernel} (once; {kept})"
    say_once(text, text)
