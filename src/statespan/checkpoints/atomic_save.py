"""Replace the files of a checkpoint all at once: whatever happens, the folder holds the old ones or the new ones.

New files are written to a hidden folder beside the old ones and forced to disk; renaming that folder is the moment of
replacement. Its files are then moved to their places; if the process dies in between, the next load or save of the
checkpoint finishes the move.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

STAGING_PREFIX = ".statespan-saving-"
COMMITTED = ".statespan-saved"
MANIFEST = ".manifest.json"  # {"files": to be moved in, "stale": to be removed}


@contextmanager
def replacing(directory: Path, owned: Callable[[str], bool]) -> Generator[Path]:
    """Yield an empty folder to write to; when the block ends without an error its files replace the owned ones.

    Args:
        directory: the checkpoint; made if it does not exist.
        owned: says of a file's name whether it belongs to a checkpoint; other files of the directory stay.
    Raises:
        OSError: nothing was replaced, for example because the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    finish_interrupted(directory)
    for left in directory.glob(STAGING_PREFIX + "*"):  # of a save that died before its moment
        shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=directory))
    try:
        yield staging
        files = sorted(file.name for file in staging.iterdir())
        stale = sorted(f.name for f in directory.iterdir() if f.is_file() and owned(f.name) and f.name not in files)
        (staging / MANIFEST).write_text(json.dumps({"files": files, "stale": stale}))
        for file in staging.iterdir():
            force_to_disk(file)
        force_to_disk(staging)
        staging.rename(directory / COMMITTED)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finish_interrupted(directory)


def finish_interrupted(directory: Path) -> None:
    """Move the files of a save to their places, where it died after its moment of replacement."""
    committed = directory / COMMITTED
    if not committed.is_dir():
        return
    if (committed / MANIFEST).exists():
        force_to_disk(directory)
        manifest = json.loads((committed / MANIFEST).read_text())
        for name in manifest["files"]:
            if (committed / name).exists():
                (committed / name).replace(directory / name)
        for name in manifest["stale"]:
            (directory / name).unlink(missing_ok=True)
        force_to_disk(directory)
        (committed / MANIFEST).unlink()
    shutil.rmtree(committed)


def force_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
