"""Which tensors of a checkpoint's files are which of a model's."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from statespan.checkpoints.families import Family
from statespan.checkpoints.families.family import NATIVE_HINT
from statespan.checkpoints.weight_files import WeightFiles
from statespan.checkpoints.weight_map import Part, Row, candidates, match
from statespan.errors import CheckpointError
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class Matched:
    """Where each tensor of a model lies in a checkpoint's files."""

    files: WeightFiles
    parts: dict[str, list[Part]]  # by our names
    stored: dict[str, str]  # names in the files by the names of the family's rows

    def read(self, part: Part) -> Tensor:
        """The piece of a tensor of ours that `part` describes."""
        tensor = self.files.read(self.stored[part.name])
        return (tensor if part.decode is None else part.decode(tensor))[part.theirs]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the files of a tensor of ours."""
        return self.files.dtypes[self.stored[self.parts[name][0].name]]


def match_files(family: Family, model: LanguageModel, files: WeightFiles, directory: Path) -> Matched:
    """Give every tensor of the model its parts, and every tensor of the files its use.

    Raises:
        CheckpointError: lists the names that are missing, left over or of another shape.
    """
    where = f"{directory}: the weights do not fit the config ({family.name})"
    stored = _names(family, files, directory)
    if model.config.tie_embeddings:
        _drop_tied_head(_table(family, model), stored, files, directory)
    try:
        parts = match(_candidates(family, model), {name: files.shapes[actual] for name, actual in stored.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return Matched(files, parts, stored)


def pieces_to_write(family: Family, model: LanguageModel) -> dict[str, list[tuple[Part, Tensor]]]:
    """For each tensor of a file of this family, the pieces of the model's tensors that make it up.

    Raises:
        CheckpointError: the family has no name for a tensor of the model.
    """
    state = model.state_dict()
    pieces: dict[str, list[tuple[Part, Tensor]]] = {}
    for ours, options in _candidates(family, model).items():
        if not options:
            raise CheckpointError(f"this model has {ours}, which {family.name} checkpoints cannot hold; {NATIVE_HINT}")
        for part in options[0]:
            pieces.setdefault(part.name, []).append((part, state[ours].detach()[part.ours]))
    return pieces


def _table(family: Family, model: LanguageModel) -> list[Row]:
    if family.table is None:
        return [Row(name, name) for name in model.state_dict()]
    return list(family.table(model.config))


def _candidates(family: Family, model: LanguageModel) -> dict[str, list[list[Part]]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return candidates(_table(family, model), model.config.layers, shapes)


def _names(family: Family, files: WeightFiles, directory: Path) -> dict[str, str]:
    """The names in the files by the names of the family's rows: aliases resolved, buffers left out."""
    stored: dict[str, str] = {}
    for actual in files.shapes:
        name = actual
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if any(re.search(pattern, name) for pattern in family.ignored):
            continue
        if name in stored:
            raise CheckpointError(f"{directory}: {actual} and {stored[name]} are the same weight; remove one of them")
        stored[name] = actual
    return stored


def _drop_tied_head(table: list[Row], stored: dict[str, str], files: WeightFiles, directory: Path) -> None:
    """Forget a stored head that equals the embedding to which it is tied."""
    names = {row.ours: row.theirs for row in table if row.ours in ("lm_head.weight", "embedding.weight")}
    head, embedding = (stored.get(str(names.get(ours))) for ours in ("lm_head.weight", "embedding.weight"))
    if head is None or embedding is None:
        return
    if not torch.equal(files.read(head), files.read(embedding)):
        raise CheckpointError(
            f"{directory}: {head} differs from {embedding} though the config ties them; "
            "set tie_word_embeddings to false in it"
        )
    del stored[str(names["lm_head.weight"])]
