"""Writing safetensors in shards, with an index and checksums."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from statespan.checkpoints.weight_files import CHECKSUMS, INDEX, SAFETENSORS, checksum
from statespan.errors import CheckpointError


def write_shards(
    directory: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor], *, max_shard_bytes: int
) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` and model.safetensors.index.json.

    Args:
        directory: where to write.
        sizes: bytes of each tensor, in the order in which they are written.
        read: gives a tensor on the CPU, contiguous; called once for each.
        max_shard_bytes: a tensor larger than this has a shard of its own.
    Raises:
        OSError: the disk is full, or another reason not to write.
    """
    shards = _split(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write({name: read(name) for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / (SAFETENSORS + INDEX)).write_text(json.dumps(index, indent=2) + "\n")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    if limit < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, got {limit}")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt", CHECKSUMS: json.dumps(checksums)}
    file.touch()
    permissions = file.stat().st_mode  # what new files have here; safetensors lets nobody else read what it writes
    try:
        safetensors.torch.save_file(tensors, file, metadata)
        file.chmod(permissions)
    except safetensors.SafetensorError as error:  # its way to say that the disk is full
        raise OSError(str(error)) from None
