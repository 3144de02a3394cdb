"""What a wheel holds besides Python: every other file of the source tree is named in pyproject.toml."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_is_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["statespan"]
    package = ROOT / "src" / "statespan"
    others = [
        path.relative_to(package)
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    ]
    left_out = [str(path) for path in others if not any(same_depth(path, pattern) for pattern in patterns)]
    assert others and not left_out


def same_depth(path: Path, pattern: str) -> bool:
    """As setuptools reads it: a star does not match a slash."""
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatch, path.parts, parts))
