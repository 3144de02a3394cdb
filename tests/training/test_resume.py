"""Checkpoints of a run: stop and go on bit for bit, atomically, whatever goes wrong while saving."""

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from statespan import checkpoints
from statespan.errors import CheckpointError, UserError
from statespan.training import ProgressDisplay, TrainingConfig, read_metrics, train
from statespan.training.metrics import Row
from statespan.training.random_state import capture_random, restore_random
from statespan.training.resume import list_checkpoints

Content = dict[str, torch.Tensor | str]


def content(checkpoint: Path) -> Content:
    """Every tensor and value of a checkpoint, but for the seconds that training took."""
    found: Content = {}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            found |= {f"{path.name}:{name}": tensor for name, tensor in load_file(path).items()}
        else:
            values = json.loads(path.read_text())
            values.pop("seconds", None)
            values.get("totals", {}).pop("seconds", None)
            found[path.name] = json.dumps(values, sort_keys=True)
    return found


def assert_same(one: Path, other: Path) -> None:
    first, second = content(one), content(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


@pytest.fixture
def long(config: TrainingConfig) -> TrainingConfig:
    """Enough steps to pass the end of an epoch, saved at each."""
    return config.override(["run.max_steps=30", "run.save_every=1", "run.keep_checkpoints=100", "run.batch_size=8"])


def timeless(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s", "held_out.seconds")} for row in rows]


@pytest.mark.parametrize("arithmetic", ["run.precision=float32", "run.precision=bfloat16"])
def test_stop_and_resume_is_bit_for_bit(tmp_path: Path, long: TrainingConfig, arithmetic: str):
    long = long.override([arithmetic])
    whole = train(long, tmp_path / "whole")
    assert whole.step == 30
    values = json.loads((whole.checkpoint / "training_state.json").read_text())
    assert values["position"]["epoch"] > 0 and values["position"]["row"] > 0
    before = timeless(read_metrics(tmp_path / "whole"))

    for stop in (1, 7, 29):
        parts = tmp_path / str(stop)
        shutil.copytree(tmp_path / "whole", parts)
        for later in list_checkpoints(parts)[stop:]:
            shutil.rmtree(later)
        random.seed(99), np.random.seed(99), torch.manual_seed(99)  # another process would not know the state either
        resumed = train(long, parts, resume=True)
        assert resumed.step == 30
        for checkpoint in list_checkpoints(tmp_path / "whole"):
            assert_same(checkpoint, parts / "checkpoints" / checkpoint.name)
        assert resumed.held_out is not None and whole.held_out is not None
        assert resumed.held_out.bits_per_byte == whole.held_out.bits_per_byte
        after = timeless(read_metrics(parts))
        assert [row["step"] for row in after] == [row["step"] for row in before]
        assert after[-2:] == before[-2:]


class Signals(ProgressDisplay):
    """A display that sends a signal to this process when a step is shown."""

    def __init__(self, number: signal.Signals, phase: str = "training") -> None:
        super().__init__()
        self.number, self.phase, self.lines = number, phase, list[str]()

    def show(self, phase: str, share: float, text: str = "") -> None:
        if phase == self.phase:
            signal.raise_signal(self.number)

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_time_invariant_layers_resume_bit_for_bit(tmp_path: Path, config: TrainingConfig):
    """Packed rows of unequal documents, S4 with A, B and dt trained, S4D in the block of Mamba, and LSSL."""
    layers = ['model.layers=["s4", "s4d+mlp", "lssl"]', "model.s4.state_size=8", "model.lssl.state_size=4"]
    layers += ["model.s4d.block=mamba", "model.mlp.intermediate_size=24", "run.save_every=1"]
    whole = train(config.override(layers), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for later in list_checkpoints(tmp_path / "parts")[3:]:
        shutil.rmtree(later)
    resumed = train(config.override(layers), tmp_path / "parts", resume=True)
    assert resumed.step == whole.step == 6
    assert_same(whole.checkpoint, resumed.checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_first_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, config: TrainingConfig, number: signal.Signals
):
    handler = signal.getsignal(number)
    display = Signals(number)
    stopped = train(config, tmp_path / "parts", display=display)
    assert (stopped.step, stopped.interrupted_by, stopped.held_out) == (2, number.name, None)
    assert stopped.checkpoint.name == "step-000002"
    assert display.lines[-1] == f"stopped by {number.name} at step 2: saved {stopped.checkpoint}, resume to go on"
    assert signal.getsignal(number) == handler
    resumed = train(config, tmp_path / "parts", resume=True)
    whole = train(config, tmp_path / "whole")
    assert (resumed.step, resumed.interrupted_by) == (6, None)
    assert_same(whole.checkpoint, resumed.checkpoint)


def test_a_signal_in_the_last_evaluation_keeps_the_checkpoint(tmp_path: Path, config: TrainingConfig):
    result = train(config, tmp_path / "run", display=Signals(signal.SIGINT, "evaluating"))
    assert (result.step, result.interrupted_by, result.held_out) == (6, "SIGINT", None)
    assert result.checkpoint.name == "step-000006"


def test_checkpoints_load_as_models_and_only_the_newest_are_kept(tmp_path: Path, config: TrainingConfig):
    result = train(config.override(["run.save_every=1", "run.keep_checkpoints=2"]), tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000005", "step-000006"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    model = checkpoints.load(result.checkpoint)
    assert model.config.hidden_size == 16
    stored = load_file(result.checkpoint / "training_state.safetensors")
    names = {name.split(".", 1)[1] for name in stored if name.startswith("optimizer.")}
    assert names == {
        f"{name}.{moment}" for name, _ in model.named_parameters() for moment in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all((stored[f"optimizer.{name}.step"] == 6).all() for name, _ in model.named_parameters())


@pytest.fixture
def half(tmp_path: Path, config: TrainingConfig) -> Path:
    """A run directory that stopped at step 2 of 6."""
    return train(config, tmp_path / "half", display=Signals(signal.SIGINT)).run_directory


def test_full_disk_is_one_line_and_keeps_the_checkpoint_before(half: Path, config: TrainingConfig):
    import resource

    before = content(half / "checkpoints" / "step-000002")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # files cannot grow beyond, as on a full disk
    try:
        with pytest.raises(CheckpointError) as error:
            train(config, half, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot save step-000006" in str(error.value)
    assert "step-000002 is untouched" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step-000002"]
    assert content(half / "checkpoints" / "step-000002").keys() == before.keys()
    assert train(config, half, resume=True).step == 6  # and with room again the run goes on


@pytest.mark.parametrize("place", ["checkpoints.save", "save_file", "force_to_disk"])
def test_a_crash_while_saving_leaves_no_half_checkpoint(
    half: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, place: str
):
    def crash(*args: object, **options: object) -> None:
        raise KeyboardInterrupt  # as a second Ctrl-C does

    with monkeypatch.context() as patch:
        patch.setattr(f"statespan.training.resume.{place}", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, half, resume=True)
    assert [path.name for path in list_checkpoints(half)] == ["step-000002"]
    assert train(config, half, resume=True).step == 6


def test_what_a_killed_process_left_is_ignored_and_removed(half: Path, config: TrainingConfig):
    folder = half / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000006.partial")
    (folder / "step-000004").mkdir()  # nothing in it
    assert [path.name for path in list_checkpoints(half)] == ["step-000002"]
    assert train(config, half, resume=True).step == 6
    assert not (folder / "step-000006.partial").exists()


def test_a_run_is_not_overwritten_and_not_resumed_from_nothing(half: Path, tmp_path: Path, config: TrainingConfig):
    with pytest.raises(
        UserError, match="half holds a run up to step-000002; resume it with --resume, or give another folder"
    ):
        train(config, half)
    with pytest.raises(UserError, match="nowhere has no checkpoint to resume from"):
        train(config, tmp_path / "nowhere", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give a folder"):
        train(config, tmp_path / "file")


def test_resume_refuses_another_model_or_data(half: Path, config: TrainingConfig):
    with pytest.raises(UserError, match=r"model\.hidden_size was 16 and is now 32; a run keeps its model and data"):
        train(config.override(["model.hidden_size=32"]), half, resume=True)
    with pytest.raises(UserError, match=r"data\.sequence_length was 16 and is now 8"):
        train(config.override(["data.sequence_length=8"]), half, resume=True)
    assert isinstance(config.data.train, str)
    with (Path(config.data.train) / "03.txt").open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match="the training text is not the same as when it was saved"):
        train(config, half, resume=True)


def test_resume_may_train_longer(half: Path, config: TrainingConfig):
    result = train(replace(config, run=replace(config.run, max_steps=9)), half, resume=True)
    assert result.step == 9
    assert TrainingConfig.load(half).run.max_steps == 9


@pytest.mark.parametrize("name", ["training_state.safetensors", "training_state.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_one_line(half: Path, config: TrainingConfig, name: str):
    path = half / "checkpoints" / "step-000002" / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError) as error:
        train(config, half, resume=True)
    assert "step-000002" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_training_state_of_another_model_is_one_line(half: Path, config: TrainingConfig):
    path = half / "checkpoints" / "step-000002" / "training_state.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"optimizer.layers.9.weight.exp_avg": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"is of another model: it has layers\.9\.weight"):
        train(config, half, resume=True)


def test_random_states_go_on_where_they_were():
    def draw() -> tuple[float, ...]:
        return (random.random(), random.gauss(0, 1), *np.random.randn(3), float(torch.rand(())))

    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        random.gauss(0, 1), np.random.randn()  # both keep a second normal number for later
        tensors, values = capture_random()
        values = json.loads(json.dumps(values))
        wanted = draw()
        draw()
        restore_random(tensors, values)
        assert draw() == wanted
