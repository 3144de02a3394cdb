"""The tensors of a checkpoint's files, read one at a time: safetensors or PyTorch's, in one file or in shards."""

import json
import pickle
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from statespan.checkpoints.config_file import read_json
from statespan.checkpoints.weight_map import Shape
from statespan.errors import CheckpointError

SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
MISTRAL = "consolidated.safetensors"
INDEX = ".index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHECKSUMS = "crc32"  # metadata key of the checksums that our files carry
AGAIN = "download or copy it again"


class WeightFiles(ABC):
    """Names, shapes and dtypes of all tensors, and each tensor when asked for."""

    def __init__(self) -> None:
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, on the CPU."""

    def _add(self, file: Path, name: str, shape: Shape, dtype: torch.dtype | None, stored: str) -> None:
        if dtype is None:
            raise CheckpointError(f"{file}: {name} is stored as {stored}; only floating-point weights are read")
        if name in self.shapes:
            raise CheckpointError(f"{file}: {name} is also in another shard; {AGAIN}")
        self.shapes[name], self.dtypes[name] = shape, dtype


def open_weights(directory: Path) -> WeightFiles:
    """The weights of a checkpoint, safetensors before pickles.

    Raises:
        CheckpointError: there are none, a shard is missing, or a file is truncated or corrupted.
    """
    for name, kind in ((SAFETENSORS, SafetensorsFiles), (PYTORCH, TorchFiles), (MISTRAL, SafetensorsFiles)):
        if (directory / (name + INDEX)).exists():
            return kind(_shards(directory / (name + INDEX)))
        if (directory / name).exists():
            return kind([directory / name])
    raise CheckpointError(f"{directory} holds no weights: neither {SAFETENSORS} nor {PYTORCH} is there; {AGAIN}")


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {AGAIN}")
    files: list[Path] = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not in its folder; {AGAIN}")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index} names {name}, which is missing; download or copy that file too")
        files.append(index.parent / name)
    return files


class SafetensorsFiles(WeightFiles):
    """Tensors of one or several safetensors files; checksums are verified where the file carries them."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self._homes: dict[str, tuple[Path, Any]] = {}
        self._checksums: dict[str, int] = {}
        for file in files:
            handle = _open_safetensors(file)
            self._checksums |= json.loads((handle.metadata() or {}).get(CHECKSUMS, "{}"))
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                piece = handle.get_slice(name)
                stored = piece.get_dtype()
                self._add(file, name, tuple(piece.get_shape()), FLOATS.get(stored), stored)
                self._homes[name] = (file, handle)

    def read(self, name: str) -> Tensor:
        file, handle = self._homes[name]
        tensor = handle.get_tensor(name).clone()  # the handle's tensor lies in the mapped file
        if name in self._checksums and checksum(tensor) != self._checksums[name]:
            raise CheckpointError(f"{file} is corrupted: {name} does not have its checksum; {AGAIN}")
        return tensor


def _open_safetensors(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; {AGAIN}")
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or corrupted ({error}); {AGAIN}") from None


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


class TorchFiles(WeightFiles):
    """Tensors of one or several files of torch.save, which are pickles: nothing in them is executed."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load_pickle(file).items():
                stored = str(tensor.dtype).removeprefix("torch.")
                dtype = tensor.dtype if tensor.dtype in FLOATS.values() else None
                self._add(file, name, tuple(tensor.shape), dtype, stored)
                self._tensors[name] = tensor

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()


def _load_pickle(file: Path) -> dict[str, Tensor]:
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file} is empty; {AGAIN}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that torch did not write
            loaded = _torch_load(file)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file} holds Python objects besides tensors, and reading them would run code; "
            "ask its author for safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is truncated or corrupted ({reason}); {AGAIN}") from None
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded  # BlackMamba wraps its weights
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} does not hold a dictionary of tensors; give a file of model weights")
    return {str(name): tensor for name, tensor in state.items()}


def _torch_load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
