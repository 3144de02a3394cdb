"""Find out what a folder holds: the family of its checkpoint and the model's config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from statespan.checkpoints.atomic_save import finish_interrupted
from statespan.checkpoints.config_file import Fields, read_json
from statespan.checkpoints.families import FAMILIES, Family
from statespan.errors import CheckpointError, UnknownName, UserError
from statespan.models.config import ModelConfig

CONFIG, PARAMS, GENERATION = "config.json", "params.json", "generation_config.json"


@dataclass(frozen=True)
class Identified:
    """A checkpoint's folder, its config file as it stands, and the family that reads it."""

    file: Path
    family: Family
    values: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        """The folder of the checkpoint."""
        return self.file.parent

    def read_config(self) -> ModelConfig:
        """The model's config, with the token ids of generation_config.json where it has some, as in transformers."""
        fields = Fields(self.values, self.file, self.family.inert_keys)
        try:
            config = self.family.read_config(fields)
            fields.finish()
        except CheckpointError:
            raise
        except UserError as error:  # what ModelConfig itself refuses
            raise CheckpointError(f"{self.file}: {error}; mend it there") from None
        return _with_generation_ids(config, self.directory / GENERATION)


def identify(path: Path) -> Identified:
    """Read the config file of the checkpoint at `path`; an interrupted save is finished first.

    Raises:
        CheckpointError: there is no checkpoint, or its format is not known.
    """
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds {CONFIG} and the weights")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint{download_hint(path)}")
    try:
        finish_interrupted(path)
    except OSError as error:
        raise CheckpointError(f"{path}: a save was interrupted and cannot be finished here: {error}") from None
    file = path / (PARAMS if (path / PARAMS).exists() and not (path / CONFIG).exists() else CONFIG)
    values = read_json(file)
    for family in FAMILIES:
        if family.matches(values):
            return Identified(file, family, values)
    if "model_type" not in values:
        raise CheckpointError(
            f"{file} has no model_type and is no config of state-spaces or BlackMamba; add model_type"
        )
    known = [family.name for family in FAMILIES if family.has_model_type]
    raise CheckpointError(f"{file}: {UnknownName('model_type', str(values['model_type']), known)}")


def download_hint(path: Path) -> str:
    """How to get a checkpoint that is called as models are on the Hugging Face Hub, OWNER/NAME."""
    if path.is_absolute() or len(path.parts) != 2 or path.parent.exists() or ".." in path.parts:
        return ", downloaded before"
    return f"; if this is its name at Hugging Face: hf download {path.as_posix()} --local-dir {path.name}"


def _with_generation_ids(config: ModelConfig, file: Path) -> ModelConfig:
    if not file.exists():
        return config
    fields = Fields(read_json(file), file)
    return config.replace(
        eos_token_ids=fields.token_ids("eos_token_id") or config.eos_token_ids,
        bos_token_id=fields.token_id("bos_token_id", config.bos_token_id),
        pad_token_id=fields.token_id("pad_token_id", config.pad_token_id),
    )
