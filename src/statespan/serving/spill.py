"""SpillStore: snapshots that left the model's memory, first in CPU memory, then in files that outlive the process."""

import hashlib
import json
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from statespan.checkpoints.atomic_save import force_to_disk
from statespan.checkpoints.weight_files import checksum
from statespan.errors import UserError
from statespan.generation.state import config_fingerprint
from statespan.models.language_model import LanguageModel

Made = TypeVar("Made")

_FORMAT = "statespan.snapshot.1"
_TOKENS = "token_ids"
_SAMPLED = 1024  # values of each weight that tell models apart
_ABANDONED_S = 600  # a file that was begun so long ago belongs to a process that died
_WRITING_BYTES = 256 << 20  # snapshots that may wait for the disk; more make the engine wait too


@dataclass(eq=False)
class Spilled:
    """A snapshot in the store: its tensors, a file, or both while it is written."""

    tokens: NDArray[np.int32]
    num_bytes: int
    tensors: dict[str, Tensor] | None = None
    file: Path | None = None
    writing: "Future[None] | None" = None


class SpillStore:
    """Keeps snapshots by value, least recently used leave first: from CPU memory to `directory`, from there for good.

    Files are written by a thread to a name of their own and renamed when they are on the disk, so that a crash leaves
    whole files only. Each carries the identity of its model, its tokens, and checksums. What is damaged or foreign is
    deleted and counted; when the disk is full the snapshot is let go.

    Args:
        identity: of the model; see `model_identity`.
        host_bytes: of CPU memory.
        directory: for the files; those of this identity are in a folder of it. None: nothing goes to disk.
        directory_bytes: of that folder.
    """

    def __init__(self, identity: str, host_bytes: int, directory: Path | None = None, directory_bytes: int = 0) -> None:
        self.identity, self.host_bytes, self.directory_bytes = identity, host_bytes, directory_bytes
        self.directory = None if directory is None else Path(directory) / identity
        self.counts: Counter[str] = Counter()  # of EngineMetrics
        self.on_drop: Callable[[Spilled], None] = lambda spilled: None
        self.memory_bytes = 0  # in CPU memory, without those on their way to the disk
        self.disk_bytes = 0  # of the files, those being written too
        self._in_memory: OrderedDict[Spilled, None] = OrderedDict()  # least recently used first
        self._on_disk: OrderedDict[Spilled, None] = OrderedDict()
        self._writer = ThreadPoolExecutor(1, "statespan-spill")
        if self.directory is not None:
            self._open(self.directory)

    def entries(self) -> list[Spilled]:
        """All snapshots, in no order."""
        return [*self._in_memory, *self._on_disk]

    def put(self, tokens: NDArray[np.int32], tensors: dict[str, Tensor]) -> Spilled | None:
        """Take a snapshot over; None where there is no room for it. Others may be dropped, see `on_drop`."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self.host_bytes and (self.directory is None or size > self.directory_bytes):
            return None
        spilled = Spilled(tokens, size, tensors)
        self._in_memory[spilled] = None
        self.memory_bytes += size
        self.counts["spilled"] += 1
        self._collect()
        while self.memory_bytes > self.host_bytes:
            self._oldest_to_disk()
        return spilled if spilled in self._in_memory or spilled in self._on_disk else None

    def load(self, spilled: Spilled, make: Callable[[int, dict[str, Tensor]], Made]) -> Made | None:
        """What `make(num_tokens, tensors)` gives; None where the file is damaged. The snapshot stays in the store."""
        recent = self._in_memory if spilled in self._in_memory else self._on_disk
        try:
            tensors = spilled.tensors
            if tensors is None:
                assert spilled.file is not None  # what is not in memory is in a file
                tensors = _read(spilled.file, self.identity)
                del tensors[_TOKENS]
            made = make(len(spilled.tokens), tensors)
        except UserError:
            self._drop(spilled)
            return None
        recent.move_to_end(spilled)
        return made

    def close(self) -> None:
        """Bring everything to disk, where there is a folder for it."""
        while self._in_memory:
            self._oldest_to_disk()
        self._collect(wait=True)
        self._writer.shutdown()

    def _open(self, directory: Path) -> None:
        """Find the files of an earlier process."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            files = sorted(directory.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
            for part in directory.glob("*.part"):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot keep snapshots there ({error.strerror})") from None
        for file in files:
            try:
                tokens = _read(file, self.identity, only=(_TOKENS,))[_TOKENS].numpy()
                spilled = Spilled(tokens, file.stat().st_size, file=file)
            except (UserError, OSError):
                file.unlink(missing_ok=True)
                self.counts["spill_dropped"] += 1
            else:
                self._on_disk[spilled] = None
                self.disk_bytes += spilled.num_bytes
        self._shrink_disk()

    def _oldest_to_disk(self) -> None:
        """Send what is least recent in CPU memory on its way."""
        spilled, _ = self._in_memory.popitem(last=False)
        self.memory_bytes -= spilled.num_bytes
        if self.directory is None or spilled.num_bytes > self.directory_bytes:
            self._drop(spilled, damaged=False)
            return
        assert spilled.tensors is not None  # it comes from memory
        name = hashlib.sha256(self.identity.encode() + spilled.tokens.tobytes()).hexdigest()[:32]
        spilled.file = self.directory / f"{name}.safetensors"
        self._on_disk[spilled] = None
        self.disk_bytes += spilled.num_bytes
        spilled.writing = self._writer.submit(_write, spilled.file, self.identity, spilled.tokens, spilled.tensors)
        self._shrink_disk()
        self._collect()

    def _shrink_disk(self) -> None:
        while self.disk_bytes > self.directory_bytes:
            self._drop(next(iter(self._on_disk)), damaged=False)

    def _collect(self, wait: bool = False) -> None:
        """Let go of the tensors that are on the disk by now; waits while too many are not."""
        writing = [spilled for spilled in self._on_disk if spilled.writing is not None]
        waiting_bytes = sum(spilled.num_bytes for spilled in writing)
        for spilled in writing:
            future = spilled.writing
            assert future is not None
            if not (wait or future.done() or waiting_bytes > _WRITING_BYTES):
                continue
            waiting_bytes -= spilled.num_bytes
            if future.exception() is None:
                spilled.tensors = spilled.writing = None
            else:  # the disk is full, or gone
                self._drop(spilled)

    def _drop(self, spilled: Spilled, damaged: bool = True) -> None:
        """Forget a snapshot and delete its file."""
        if spilled in self._in_memory:
            del self._in_memory[spilled]
            self.memory_bytes -= spilled.num_bytes
        if spilled in self._on_disk:
            del self._on_disk[spilled]
            self.disk_bytes -= spilled.num_bytes
        file = spilled.file
        if file is not None:
            self._writer.submit(_delete, file)  # after a write of it that may be under way
        self.counts["spill_dropped"] += damaged
        self.on_drop(spilled)


def model_identity(model: LanguageModel, page_size: int) -> str:
    """A short hash of config, dtypes and weights: states of models that differ in it must not be mixed.

    Of each weight up to 1,024 values spread over it are read, so that it is quick for any size.
    """
    digest = hashlib.sha256(f"{config_fingerprint(model.config)} {page_size}".encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(file: Path, identity: str, tokens: NDArray[np.int32], tensors: Mapping[str, Tensor]) -> None:
    """Raises OSError where that does not work, and leaves nothing behind."""
    contents = {name: tensor.contiguous() for name, tensor in tensors.items()} | {_TOKENS: torch.from_numpy(tokens)}
    header = {
        "format": _FORMAT,
        "identity": identity,
        "checksums": json.dumps({name: checksum(tensor) for name, tensor in contents.items()}),
    }
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(contents, part, header)
        force_to_disk(part)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        _delete(part)
        raise OSError(str(error)) from None


def _read(file: Path, identity: str, only: Iterable[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file, or those in `only`. UserError where it is damaged or of another model."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if (header.get("format"), header.get("identity")) != (_FORMAT, identity):
                raise UserError(f"{file}: not a snapshot of this model")
            checksums = json.loads(header["checksums"])
            # Copies: memory that maps a file kills the process when somebody cuts the file short.
            tensors = {name: opened.get_tensor(name).clone() for name in only}
        if not only:
            tensors = load(file.read_bytes())
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not a snapshot, or damaged ({error})") from None
    for name, tensor in tensors.items():
        if checksums.get(name) != checksum(tensor):
            raise UserError(f"{file}: {name} is damaged, its checksum differs")
    if not only and set(checksums) != set(tensors):
        raise UserError(f"{file}: tensors are missing")
    return tensors


def _delete(file: Path) -> None:
    file.unlink(missing_ok=True)
