"""A checkpoint is replaced whole or not at all: full disks, dying processes, stale files."""

import errno
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from statespan.checkpoints import load, save
from statespan.errors import CheckpointError
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel

OLD = ModelConfig(vocab_size=11, hidden_size=8)
NEW = ModelConfig(vocab_size=13, hidden_size=16, tie_embeddings=False)
SHARD = 2_000


class Killed(BaseException):
    """Stands for the death of the process: no handler of ours may catch it and go on."""


@pytest.fixture
def folder(build_random: Any, tmp_path: Path) -> Path:
    """A checkpoint of the old model in shards, with a file of the user's beside it."""
    save(build_random(OLD), tmp_path / "model", max_shard_bytes=SHARD)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    return tmp_path / "model"


@pytest.fixture
def new(build_random: Any) -> LanguageModel:
    return build_random(NEW)


def same_weights(model: LanguageModel, other: LanguageModel) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_holds(folder: Path, model: LanguageModel, number_of_shards: int) -> None:
    """The folder holds this model and nothing that is left of another save."""
    assert same_weights(load(folder), model)
    assert len(list(folder.glob("*.safetensors"))) == number_of_shards
    expected = {"config.json", "notes.txt"} | ({"model.safetensors.index.json"} if number_of_shards > 1 else set())
    assert {file.name for file in folder.iterdir() if file.suffix != ".safetensors"} == expected


def test_a_save_replaces_shards_and_index_and_keeps_other_files(folder: Path, new: LanguageModel) -> None:
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    save(new, folder)
    assert_holds(folder, new, number_of_shards=1)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_old_checkpoint(folder: Path, new: LanguageModel, monkeypatch: Any) -> None:
    before, write, calls = load(folder), safetensors.torch.save_file, []

    def fail_at_the_second_shard(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", fail_at_the_second_shard)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device.*make room") as caught:
        save(new, folder, max_shard_bytes=SHARD)
    assert "\n" not in str(caught.value)
    assert_holds(folder, before, len(list(folder.glob("*.safetensors"))))


def test_weights_may_be_read_by_whom_other_new_files_may(tmp_path: Path, new: LanguageModel) -> None:
    """safetensors gives its files to their owner alone; a server run by another user could not read them."""
    mask = os.umask(0o027)
    try:
        save(new, tmp_path / "saved")
    finally:
        os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "saved").iterdir()} == {0o640}


def test_a_write_that_the_system_refuses(folder: Path, new: LanguageModel) -> None:
    """The same with the system's own limit on the size of files."""
    before, limits = load(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save(new, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(folder, before, len(list(folder.glob("*.safetensors"))))


def test_death_before_the_moment_of_replacement(folder: Path, new: LanguageModel, monkeypatch: Any) -> None:
    before = load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed()))
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the dead clean nothing up
        with pytest.raises(Killed):
            save(new, folder)
    assert same_weights(load(folder), before)
    save(new, folder)
    assert_holds(folder, new, number_of_shards=1)


@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("finished_by", ["load", "save"])
def test_death_while_files_move(
    moved: int, finished_by: str, folder: Path, new: LanguageModel, monkeypatch: Any
) -> None:
    replace, done = Path.replace, []

    def die_later(source: Path, target: Path) -> Path:
        if len(done) == moved:
            raise Killed
        done.append(target)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_later)
        with pytest.raises(Killed):
            save(new, folder)
    if finished_by == "load":
        assert_holds(folder, new, number_of_shards=1)
    else:
        save(new, folder, max_shard_bytes=SHARD)
        assert_holds(folder, new, number_of_shards=len(list(folder.glob("model-*-of-*.safetensors"))))


def test_death_while_stale_files_go(folder: Path, new: LanguageModel, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            save(new, folder)
    assert_holds(folder, new, number_of_shards=1)


def test_a_folder_that_is_a_file(new: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(new, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
