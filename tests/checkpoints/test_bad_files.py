"""Files that are missing, empty, truncated, corrupted or foreign: one line each, naming the file and the mend."""

import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import statespan
from statespan.checkpoints import detect, load, save
from statespan.checkpoints.weight_files import SafetensorsFiles, TorchFiles, open_weights
from statespan.errors import CheckpointError, UserError
from statespan.layers.config import MLPConfig, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

CONFIG = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    layers=(LayerSpec("mamba1", "moe"), LayerSpec("attention", "mlp")),
    mlp=MLPConfig(12),
    moe=MoEConfig(num_experts=3, intermediate_size=12),
)


@pytest.fixture(scope="module")
def saved(build_random: Any, tmp_path_factory: Any) -> Path:
    """A good checkpoint in several shards."""
    folder = tmp_path_factory.mktemp("saved")
    save(build_random(CONFIG), folder, max_shard_bytes=5_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def fails(folder: Path, *words: str) -> None:
    """Loading is refused in one line with all these words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def test_nothing_there(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "does not exist", "give the folder of a checkpoint")
    fails(tmp_path, "config.json is missing")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("state-spaces/mamba-130m-hf", "hf download state-spaces/mamba-130m-hf --local-dir mamba-130m-hf"),
        ("models/mamba", "give the folder of a checkpoint, downloaded before"),  # the folder `models` is there
        ("../mamba", "give the folder of a checkpoint, downloaded before"),
        ("runs/first/checkpoints", "give the folder of a checkpoint, downloaded before"),
    ],
)
def test_a_name_of_hugging_face(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    fails(Path(name), "does not exist", told)


@pytest.mark.parametrize(
    ("device", "told"), [("gpu", "'gpu' is no device; write cpu"), ("cuda:99", "'cuda:99' cannot be used here")]
)
def test_a_device_that_is_none(device: str, told: str, folder: Path) -> None:
    for make in (lambda: load(folder, device=device), lambda: statespan.build("jamba-tiny", device=device)):
        with pytest.raises(UserError, match=told):
            make()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 16])
def test_a_dtype_that_is_none(dtype: Any, folder: Path) -> None:
    with pytest.raises(UserError, match=r"dtype must be .* such as torch\.bfloat16; got"):
        load(folder, dtype=dtype)


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    fails(folder / "config.json", "is a file; give the folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "config.json is empty; download or copy it again"),
        ('{"model_type": "statespan",}', "config.json is not JSON: "),
        ("[1]", "config.json must hold a JSON object, it holds list"),
        ("\udcff", "config.json cannot be read"),
        ('{"hidden_size": 3}', "has no model_type"),
        ('{"model_type": "mixtrall"}', "unknown model_type: 'mixtrall'; did you mean 'mixtral'?"),
        ('{"model_type": "gpt2"}', "unknown model_type: 'gpt2'; known: jamba, llama, mamba"),
        ('{"model_type": "statespan", "format_version": 2, "model": {}}', "format_version 2 is newer than 1; update"),
        ('{"model_type": "statespan", "model": {}}', "format_version is missing"),
        (
            '{"model_type": "statespan", "format_version": 1, "model": {"hiden_size": 8}}',
            "unknown key in ModelConfig: 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            '{"model_type": "statespan", "format_version": 1, "model": {"hidden_size": "8"}}',
            "ModelConfig.hidden_size: expected int, got '8'",
        ),
        ('{"model_type": "statespan", "format_version": 1, "model": 5}', "expected an object"),
        ('{"model_type": "statespan", "format_version": 1, "model": {}, "extra": 1}', "key 'extra' is not known here"),
    ],
)
def test_bad_configs(text: str, words: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, errors="surrogateescape")
    fails(folder, words)


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    fails(folder, "holds no weights: neither model.safetensors nor pytorch_model.bin is there")


def test_a_missing_shard(folder: Path) -> None:
    missing = shard(folder)
    missing.unlink()
    fails(folder, f"model.safetensors.index.json names {missing.name}, which is missing; download or copy that file")


@pytest.mark.parametrize("index", ['{"weight_map": {}}', "{}", '{"weight_map": {"a": "../model.safetensors"}}', ""])
def test_a_bad_index(index: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    fails(folder, "model.safetensors.index.json")


def test_an_empty_shard(folder: Path) -> None:
    shard(folder).write_bytes(b"")
    fails(folder, f"{shard(folder).name} is empty")


@pytest.mark.parametrize("keep", [4, 60, -1, -100])
def test_a_truncated_shard(keep: int, folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:keep])
    fails(folder, f"{shard(folder).name} is truncated or corrupted", "download or copy it again")


def test_a_corrupted_header(folder: Path) -> None:
    content = bytearray(shard(folder).read_bytes())
    content[9:20] = bytes(range(200, 211))
    shard(folder).write_bytes(content)
    fails(folder, f"{shard(folder).name} is truncated or corrupted")


def test_one_flipped_bit_of_the_weights(folder: Path) -> None:
    content = bytearray(shard(folder).read_bytes())
    content[-5] ^= 1
    shard(folder).write_bytes(content)
    fails(folder, f"{shard(folder).name} is corrupted", "does not have its checksum")


def edit_weights(folder: Path, edit: Any) -> None:
    """Change the tensors of a shard, without checksums as other programs write."""
    tensors = safetensors.torch.load_file(shard(folder))
    edit(tensors)
    safetensors.torch.save_file(tensors, shard(folder))


def test_names_that_do_not_fit_are_listed(folder: Path) -> None:
    moved: list[str] = []

    def edit(tensors: dict[str, Tensor]) -> None:
        first, second = sorted(tensors)[:2]
        moved.extend((first, second))
        tensors["stranger.weight"] = tensors.pop(first)
        tensors[second] = torch.zeros(1, 2, 3)

    edit_weights(folder, edit)
    fails(
        folder,
        "the weights do not fit the config (statespan)",
        f"missing: {moved[0]} [",
        "left over: stranger.weight [",
        f"wrong shape: {moved[1]} is [1, 2, 3] and should be [",
    )


def test_weights_that_are_no_floats(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["packed"] = torch.zeros(3, dtype=torch.int8)

    edit_weights(folder, edit)
    fails(folder, "packed is stored as I8; only floating-point weights are read")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    files = sorted(folder.glob("model-*.safetensors"))
    shutil.copy(files[0], files[1])
    fails(folder, "is also in another shard")


class RunsCode:
    """A pickle that would make a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"weight": torch.zeros(2), "args": RunsCode(tmp_path / "ran")}, folder / "pytorch_model.bin")
    fails(folder, "pytorch_model.bin holds Python objects besides tensors, and reading them would run code")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    fails(folder, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no pickle at all"])
def test_a_broken_pickle(content: bytes, folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    fails(folder, "pytorch_model.bin")


def test_a_truncated_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({"weight": torch.zeros(500)}, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    fails(folder, "pytorch_model.bin is truncated or corrupted")


@pytest.mark.parametrize("content", [torch.zeros(3), {"a": 1}, {"optimizer": {"a": torch.zeros(1)}}])
def test_a_pickle_of_something_else(content: Any, folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(content, folder / "pytorch_model.bin")
    fails(folder, "does not hold a dictionary of tensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_of_weights_are_read(legacy: bool, shards: int, folder: Path) -> None:
    expected = load(folder)
    for file in folder.glob("model*"):
        file.unlink()
    state = expected.state_dict()
    names = list(state)
    files = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: state[name] for name in names[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        index = {"weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert isinstance(open_weights(folder), TorchFiles)
    actual = load(folder)
    assert all(torch.equal(actual.state_dict()[name], tensor) for name, tensor in state.items())
    for file in files:  # the model does not lean on the files that it came from
        (folder / file).write_bytes(b"")
    assert all(torch.equal(actual.state_dict()[name], tensor) for name, tensor in state.items())


def test_detect_does_not_need_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    assert detect(folder) == "statespan"


def test_tensors_are_read_one_at_a_time(folder: Path, monkeypatch: Any) -> None:
    """When a tensor is read, those read before it are gone, but for the ones that are the model's as they are."""
    kept = sum(name.endswith(("A_log", ".D", "dt_bias")) for name in load(folder).state_dict())
    alive: set[int] = set()
    counts: list[int] = []
    read = SafetensorsFiles.read

    def watched(files: SafetensorsFiles, name: str) -> Tensor:
        counts.append(len(alive))
        tensor = read(files, name)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", watched)
    load(folder, dtype=torch.bfloat16)
    assert len(counts) > 10 and max(counts) <= kept + 1
