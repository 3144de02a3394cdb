"""Documents from files and folders: text and source code (a file is a document), jsonl and parquet (a row is one)."""

import fnmatch
import glob
import itertools
import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from statespan.errors import DataError, first_line

# What a folder is searched for; a file that is named itself may end in anything.
ROW_LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
LEAVE_OUT = "mend the file, or leave it out with data.exclude"
MOST_FIELDS = 8  # of a row, that a message names
TEXT_ENDINGS = (
    "txt text md markdown rst tex org adoc html xml css csv tsv toml yaml yml ini cfg sql "
    "py pyi pyx ipynb c h cc cpp cxx hpp cu cuh m java kt scala js jsx ts tsx go rs rb php pl "
    "r jl lua hs ml ex erl clj el lisp scm swift cs fs dart f90 sh bash zsh vim cmake"
)
TEXT_SUFFIXES = frozenset(f".{ending}" for ending in TEXT_ENDINGS.split())
# Of source text are left out: what users installed, test-suites (not every distribution ships them), and files that
# programs wrote (tables of character encodings, the help texts), so that what is left is source that people wrote.
NO_SOURCES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)


def find_files(paths: str | Iterable[str], exclude: Iterable[str] = ()) -> list[Path]:
    """The files that `paths` name, folders searched in sorted order, hidden and excluded ones left out.

    Raises DataError for a path that does not exist, an empty file that was named itself, a folder with nothing to read.
    """
    files: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        path = Path(name).expanduser()
        if path.is_dir():
            files += _files_of_folder(path, tuple(exclude))
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
        else:
            files.append(path)
    return files


def _files_of_folder(folder: Path, exclude: tuple[str, ...]) -> list[Path]:
    def wanted(path: Path) -> bool:
        relative = path.relative_to(folder)
        return (
            path.suffix.lower() in TEXT_SUFFIXES | ROW_LOADERS.keys()
            and not any(part.startswith(".") for part in relative.parts)
            and not any(fnmatch.fnmatch(relative.as_posix(), pattern) for pattern in exclude)
            and path.is_file()
            and path.stat().st_size > 0
        )

    files = [path for path in sorted(folder.rglob("*")) if wanted(path)]
    if not files:
        raise DataError(f"{folder}: the folder has no text, jsonl or parquet file with anything in it")
    return files


def python_sources(root: Path, max_files: int | None = None, seed: int = 0) -> list[Path]:
    """The .py files under `root` that are not empty, are UTF-8 and are in no folder of NO_SOURCES: sorted, relative.

    Args:
        root: such as the folder of the standard library.
        max_files: take this many, drawn with the seed; None: all.
        seed: of the draw.
    """
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    wanted = [path for path in paths if not NO_SOURCES & set(path.parts)]
    if max_files is not None:
        random.Random(seed).shuffle(wanted)
    return sorted(itertools.islice((path for path in wanted if _is_text(root / path)), max_files))


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, OSError):
        return False


def read_documents(files: Iterable[Path], text_field: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """The documents of `files` in order, without empty ones, cut at line ends where longer than `max_bytes`.

    Raises DataError that names the file and the byte or row: not UTF-8, not jsonl or parquet, no `text_field` in a row.
    """
    for path in files:
        loader = ROW_LOADERS.get(path.suffix.lower())
        texts = [_read_text(path)] if loader is None else _read_rows(path, loader, text_field)
        for text in texts:
            if text:
                yield from [text] if max_bytes is None else cut_at_lines(text, max_bytes)


def _read_text(path: Path) -> str:
    # Read as bytes: datasets' text loader opens files in text mode, which changes line ends and so the count of bytes.
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return _decode(data, path)


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); "
            "convert the file, or leave it out with data.exclude"
        ) from None


def _read_rows(path: Path, loader: str, text_field: str) -> Iterator[str]:
    """The text field of each row of a jsonl or parquet file, streamed through Hugging Face datasets."""
    for number, row in enumerate(_stream(path, loader), 1):
        if text_field not in row:
            known = ", ".join(sorted(row)[:MOST_FIELDS]) + (", .." if len(row) > MOST_FIELDS else "")
            raise DataError(
                f"{path}: row {number} has no field {text_field!r}; set data.text_field to one of: {known}; "
                "or leave the file out with data.exclude"
            )
        text = row[text_field]
        if not isinstance(text, str):
            raise DataError(
                f"{path}: field {text_field!r} of row {number} is not text: {first_line(json.dumps(text, default=str))}"
            )
        yield text


def _stream(path: Path, loader: str) -> Iterator[dict[str, Any]]:
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes as DataError
    try:
        with tempfile.TemporaryDirectory() as cache:  # streaming keeps nothing, but makes a lock file
            yield from datasets.load_dataset(
                loader, data_files=[glob.escape(str(path.absolute()))], split="train", streaming=True, cache_dir=cache
            )
    except Exception as error:  # the loaders raise many kinds, of pyarrow, pandas and their own
        raise _diagnose(path, loader, error) from None
    finally:
        datasets.logging.set_verbosity(level)


def _diagnose(path: Path, loader: str, error: Exception) -> DataError:
    """What is wrong with a file that datasets refused: for jsonl the byte or the line, else the loader's own words."""
    if loader == "json":
        for number, line in enumerate(_read_text(path).split("\n"), 1):
            try:
                json.loads(line or "null")
            except json.JSONDecodeError as problem:
                return DataError(f"{path}: line {number} is not JSON: {problem}; {LEAVE_OUT}")
    return DataError(f"{path}: cannot be read as {loader}: {first_line(error)}; {LEAVE_OUT}")


def cut_at_lines(text: str, max_bytes: int) -> Iterator[str]:
    """Pieces of `text` of at most `max_bytes` bytes of UTF-8 that end at line ends, or between characters where a line
    is longer (a single character is never cut). Joined they are `text`."""
    data, start = text.encode(), 0
    while len(data) - start > max_bytes:
        end = data.rfind(b"\n", start, start + max_bytes) + 1
        if end <= start:
            end = start + max_bytes
            while end > start + 1 and data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            while end < len(data) and data[end] & 0xC0 == 0x80:  # the first character alone is longer than max_bytes
                end += 1
        yield data[start:end].decode()
        start = end
    if start < len(data):
        yield data[start:].decode()
