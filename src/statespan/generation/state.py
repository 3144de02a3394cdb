"""GenerationState: where a generation stopped, as a value to continue, fork, save and restore."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.kv_cache import KVCache
from statespan.layers.state import ModelState, State
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel

_FORMAT = "statespan.generation_state.1"


@dataclass(frozen=True)
class GenerationState:
    """A sequence so far: `model_state` has absorbed all its tokens but `pending`, the newest one.

    The next `generate(..., state=)` feeds `pending` and then its prompt, which may be empty. A state is a value: using
    it twice forks the sequence, and costs no second prefill.
    """

    model_state: ModelState  # of one row
    pending: int  # token id


def save_state(path: str | Path, state: GenerationState, model: LanguageModel) -> None:
    """Write the state to a safetensors file whose header tells which model it belongs to.

    Args:
        path: the file, replaced where there is one.
        state: a Generation's, from `return_state=True`.
        model: the one that made it.
    Raises:
        UserError: the file cannot be written; a file that was there before is kept.

    Example:
        >>> import statespan, tempfile
        >>> from statespan.generation import load_state, save_state
        >>> file = tempfile.mkdtemp() + "/story.state"
        >>> model = statespan.build("jamba-tiny", seed=0)
        >>> first = statespan.generate(model, [1, 2, 3], max_new_tokens=4, return_state=True)
        >>> save_state(file, first.state, model)
        >>> more = statespan.generate(model, [], state=load_state(file, model))
    """
    path = Path(path)
    layers = [None if layer is None else _compact(layer) for layer in state.model_state.layers]
    header = {
        "format": _FORMAT,
        "config": config_fingerprint(model.config),
        "pending": state.pending,
        "layers": [None if layer is None else _numbers(layer) for layer in layers],
    }
    tensors = {
        f"layers.{index}.{name}": value.contiguous()
        for index, layer in enumerate(layers)
        if layer is not None
        for name, value in layer.tensors().items()
    }
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"statespan": json.dumps(header)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write the state to {path}: {error}") from None


def load_state(path: str | Path, model: LanguageModel) -> GenerationState:
    """Read a state that `save_state` wrote, onto the model's device.

    Args:
        path: the file.
        model: the one that made the state, or one with the same config and dtype.
    Returns:
        What `generate(model, prompt, state=...)` goes on from; an example is at `save_state`.
    Raises:
        UserError: no such file, not a state, damaged, or of a model with another config or dtype.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such state file")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            header = json.loads((file.metadata() or {}).get("statespan", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a state file, or damaged ({error})") from None
    if header.get("format") != _FORMAT:
        raise UserError(f"{path}: no saved state; states are written by statespan.generation.save_state")
    if header["config"] != config_fingerprint(model.config):
        raise UserError(
            f"{path}: the state belongs to a model with another config; load it with the model that made it"
        )
    layers = tuple(
        None if empty is None else _restore(empty, numbers, tensors, f"layers.{index}.", path)
        for index, (empty, numbers) in enumerate(zip(model.new_state(1).layers, header["layers"], strict=True))
    )
    return GenerationState(ModelState(layers), header["pending"])


def config_fingerprint(config: ModelConfig) -> str:
    """A short hash of everything that decides a model's shape and arithmetic."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compact(layer: State) -> State:
    """Without the room that a cache keeps for growing."""
    if not isinstance(layer, KVCache):
        return layer
    used = slice(layer.length)
    return dataclasses.replace(
        layer, key=layer.key[:, used], value=layer.value[:, used], position=layer.position[:, used]
    )


def _numbers(layer: State) -> dict[str, int | bool]:
    """The fields that are plain numbers, such as a cache's length."""
    values = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}  # type: ignore[arg-type]  # every State is a dataclass
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _restore(empty: State, numbers: dict[str, Any], tensors: dict[str, Tensor], prefix: str, path: str | Path) -> State:
    """The layer's state: of the kind, with the tensors and in the dtypes that the model makes."""
    fields: dict[str, Any] = {}
    for name, want in empty.tensors().items():
        have = tensors.get(prefix + name)
        if have is None:
            raise UserError(f"{path}: the state lacks {prefix + name}; the file is damaged")
        if have.dtype != want.dtype:
            raise UserError(f"{path}: {prefix + name} is {_short(have.dtype)}, the model works in {_short(want.dtype)}")
        fields[name] = have
    return dataclasses.replace(empty, **fields, **numbers)  # type: ignore[type-var]  # every State is a dataclass


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
