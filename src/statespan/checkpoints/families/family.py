"""What a checkpoint format is: a config translation both ways, and rows of weight names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statespan.checkpoints.config_file import Fields
from statespan.checkpoints.weight_map import Row
from statespan.errors import CheckpointError
from statespan.models.config import ModelConfig

LAYER = "backbone.layers.{i}."  # of our state dict
NATIVE_HINT = "save it with format='statespan'"


@dataclass(frozen=True)
class Family:
    """A format of checkpoints that can be read, and written where `write_config` is there."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]  # is this config.json of the family?
    read_config: Callable[[Fields], ModelConfig]
    table: Callable[[ModelConfig], Sequence[Row]] | None = None  # None: the file uses our names
    write_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    renames: tuple[tuple[str, str], ...] = ()  # (regular expression, replacement): older names in files
    ignored: tuple[str, ...] = ()  # regular expressions: buffers in files that follow from the config
    inert_keys: frozenset[str] = frozenset()  # keys of the config that change nothing of the result
    has_model_type: bool = True  # config.json says model_type = name


def subtree(ours: str, theirs: str, names: Iterable[str], *, only: str) -> list[Row]:
    """Rows for tensors that have the same names under two prefixes, in layers of one kind."""
    return [Row(ours + name, theirs + name, only=only) for name in names]


def refuse_unless(condition: bool, has: str, family: str) -> None:
    """Raise the one line for a model that the family cannot express."""
    if not condition:
        raise CheckpointError(f"this model has {has}, which {family} checkpoints cannot express; {NATIVE_HINT}")


def read_token_ids(fields: Fields, *, bos: int | None, eos: int | None, pad: int | None) -> dict[str, Any]:
    """ModelConfig's token ids from the keys of all transformers configs; arguments are the family's defaults."""
    return {
        "bos_token_id": fields.token_id("bos_token_id", bos),
        "eos_token_ids": fields.token_ids("eos_token_id", eos),
        "pad_token_id": fields.token_id("pad_token_id", pad),
    }


def write_token_ids(config: ModelConfig) -> dict[str, Any]:
    """The same keys for a file of transformers."""
    eos = config.eos_token_ids
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_token_id,
    }
