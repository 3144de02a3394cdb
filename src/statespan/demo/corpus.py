"""The demo's text: the running interpreter's standard library, split by file into training and held-out text."""

import gzip
import lzma
import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from statespan.errors import DataError
from statespan.training.documents import python_sources

EXCLUSIONS = "without tests, site-packages, tables of encodings, generated help texts, and files that are not UTF-8"
HELD_OUT_FRACTION = 0.05


@dataclass(frozen=True)
class SourceSplit:
    """Files of the standard library in sorted order, by path inside `root`; no file is in both."""

    root: Path
    train: tuple[Path, ...]
    held_out: tuple[Path, ...]

    def copy_to(self, folder: Path) -> None:
        """Write the files, byte for byte, to `folder`/train and `folder`/held-out, in place of what was there."""
        shutil.rmtree(folder, ignore_errors=True)
        for name, files in (("train", self.train), ("held-out", self.held_out)):
            for file in files:
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((self.root / file).read_bytes())

    def train_size(self) -> int:
        """Bytes of the training files."""
        return sum((self.root / file).stat().st_size for file in self.train)

    def held_out_bytes(self) -> bytes:
        """The held-out files one after the other."""
        return b"".join((self.root / file).read_bytes() for file in self.held_out)


def split_sources(seed: int, root: Path | None = None, max_files: int | None = None) -> SourceSplit:
    """Draw the held-out files of the standard library with `seed`; the rest is for training.

    Args:
        seed: of the draw.
        root: folder to search instead of the interpreter's own.
        max_files: take this many files, drawn with the seed; None: all.
    Raises:
        DataError: fewer than two source files there (some interpreters carry their library compiled or zipped), or
            fewer than two asked for.
    """
    if max_files is not None and max_files < 2:
        raise DataError(f"{max_files} file leaves nothing to train on, since one is held out; take at least 2")
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    files = python_sources(root)
    if len(files) < 2:
        raise DataError(f"{root}: {len(files)} Python source files; run the demo with a Python that has its sources")
    chooser = random.Random(seed)
    chooser.shuffle(files)
    files = files[:max_files]
    count = max(1, round(HELD_OUT_FRACTION * len(files)))
    return SourceSplit(root, tuple(sorted(files[count:])), tuple(sorted(files[:count])))


@dataclass(frozen=True)
class CompressedSizes:
    """Bytes of the held-out text as general compressors leave it, all files in one stream."""

    original: int
    gzip: int  # gzip -9
    xz: int  # xz -9

    def bits_per_byte(self, size: int) -> float:
        """Compressed bits a byte of the original."""
        return 8 * size / self.original


def compress(text: bytes) -> CompressedSizes:
    """`text` in one stream, which favours the compressors: they may refer back to earlier files, the model may not."""
    return CompressedSizes(len(text), len(gzip.compress(text, 9)), len(lzma.compress(text, preset=9)))
