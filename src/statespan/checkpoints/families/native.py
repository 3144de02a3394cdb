"""Statespan's own format: ModelConfig as JSON, and our own names."""

from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.families.family import Family
from statespan.errors import CheckpointError, UserError
from statespan.models.config import ModelConfig

FORMAT_VERSION = 1


def read_config(fields: Fields) -> ModelConfig:
    version = fields.integer("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{fields.where}: format_version {version} is newer than {FORMAT_VERSION}; update statespan to read it"
        )
    try:
        return ModelConfig.from_dict(fields.take("model"))
    except UserError as error:
        raise CheckpointError(f"{fields.where}: {error}") from None


def write_config(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "statespan", "format_version": FORMAT_VERSION, "model": config.to_dict()}


NATIVE = Family(
    name="statespan",
    matches=lambda raw: raw.get("model_type") == "statespan",
    read_config=read_config,
    write_config=write_config,
)
