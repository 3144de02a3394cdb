"""Checkpoints of a run: the model's own files and what it takes to go on bit for bit.

    run/checkpoints/step-000100/   config.json, model.safetensors, tokenizer files: `statespan.load` reads the folder
                                   training_state.safetensors   AdamW's moments by parameter name, random states
                                   training_state.json          step, seconds, place in the data, hash of the data

A checkpoint is written beside its place under another name, forced to disk, and renamed: a folder called step-N is
complete. Nothing is pickled.
"""

import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW

from statespan import checkpoints
from statespan.checkpoints.atomic_save import force_to_disk
from statespan.dataclass_io import from_plain, to_plain
from statespan.errors import CheckpointError
from statespan.models.language_model import LanguageModel
from statespan.training.metrics import Totals
from statespan.training.packing import DataPosition
from statespan.training.random_state import capture_random, restore_random

FOLDER, TENSORS, VALUES = "checkpoints", "training_state.safetensors", "training_state.json"


@dataclass(frozen=True)
class RunState:
    """How far a run is."""

    step: int = 0  # updates made
    seconds: float = 0.0  # of training steps
    num_tokens: int = 0  # tokens processed
    position: DataPosition = field(default_factory=DataPosition)
    totals: Totals = field(default_factory=Totals)  # of the steps since the last row of metrics
    data: str = ""  # fingerprint of the training corpus


def list_checkpoints(run_directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in (run_directory / FOLDER).glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / VALUES).exists()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(run_directory: Path, model: LanguageModel, optimizer: AdamW, state: RunState, keep: int) -> Path:
    """Write the checkpoint of this step, then remove all but the `keep` newest.

    Raises CheckpointError where it cannot be written, such as on a full disk; the older ones are then untouched.
    """
    existing = list_checkpoints(run_directory)
    final = run_directory / FOLDER / f"step-{state.step:06d}"
    if final in existing:
        return final
    partial = final.with_suffix(".partial")
    with _removed_on_failure(partial, final.name, existing):
        partial.mkdir(parents=True)
        checkpoints.save(model, partial, format="statespan")
        tensors = {
            f"optimizer.{name}.{key}": value.contiguous()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        random_tensors, random_values = capture_random()
        tensors |= {f"random.{name}": tensor for name, tensor in random_tensors.items()}
        save_file(tensors, partial / TENSORS)
        values = to_plain(state) | {"random": random_values}
        (partial / VALUES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        for path in (partial / TENSORS, partial / VALUES, partial):
            force_to_disk(path)
        partial.rename(final)
        force_to_disk(final.parent)
    for old in [*existing, final][:-keep]:
        shutil.rmtree(old)
    return final


def restore(checkpoint: Path, model: LanguageModel, optimizer: AdamW) -> RunState:
    """Put the optimizer and the random states back as they were; `model` has been loaded from the checkpoint."""
    try:
        tensors = load_file(checkpoint / TENSORS)
        values = json.loads((checkpoint / VALUES).read_text(encoding="utf-8"))
        random_values = values.pop("random")
        state = from_plain(RunState, values)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: the training state cannot be read: {error}") from None
    parameters = dict(model.named_parameters())
    random_tensors = dict[str, Tensor]()
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "random":
            random_tensors[name] = value
        else:
            name, _, moment = name.rpartition(".")
            if name not in parameters:
                raise CheckpointError(f"{checkpoint}: {TENSORS} is of another model: it has {name}")
            optimizer.state[parameters[name]][moment] = value.to(parameters[name].device)
    restore_random(random_tensors, random_values)
    return state


@contextmanager
def _removed_on_failure(partial: Path, name: str, existing: list[Path]) -> Generator[None]:
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed while saving
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        last = f"{existing[-1]} is untouched" if existing else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot save {name} in {partial.parent}: {error}; {last}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # renamed by now, or not finished
