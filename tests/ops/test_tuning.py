"""The tuning table: what it says, what the user's adds, and how it is made."""

import json
import sys
import time
import timeit
from importlib import import_module

import pytest
import torch

from statespan.errors import UserError
from statespan.ops import notices, tuning
from statespan.ops.tuning import tune

if sys.platform != "linux":
    pytest.skip("Triton is published for Linux only", allow_module_level=True)

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
EVERY = [tunable for module in tuning.MODULES.values() for tunable in import_module(module).TUNABLES]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The user's table, a file that is not there yet, on a machine with an H100."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(notices, "_said", set())
    tuning.forget()
    yield tmp_path / "statespan" / "tuning.json"
    tuning.forget()


def tunable(name: str) -> tuning.Tunable:
    return next(known for known in EVERY if known.name == name)


def test_the_shipped_table_has_every_tunable_and_parameter_and_nothing_else(table) -> None:
    shipped = tuning.shipped_table()
    assert list(shipped) == [known.name for known in EVERY] == [known.name for known in tuning.tunables()]
    tuning._check(shipped)
    for known in EVERY:
        assert tuning.ANY in shipped[known.name][tuning.ANY]
        assert all(row.keys() == known.choices.keys() for row in known.candidates())
        assert known.best(CPU, known.sizes[0]).keys() == known.choices.keys()


def test_the_nearest_row_of_the_kind_of_gpu_rules(table, monkeypatch) -> None:
    rows = {"any": {"any": {"tile": 1}}, "NVIDIA H100 80GB HBM3": {"1000": {"tile": 2}, "4000": {"tile": 3}}}
    monkeypatch.setattr(tuning, "shipped_table", tuning.cache(lambda: {"rms_norm.forward": rows}))
    forward = tunable("rms_norm.forward")
    found = {size: forward.best(GPU, size)["tile"] for size in (0, 1, 1000, 1900, 2100, 4000, 10**6)}
    assert found == {0: 2, 1: 2, 1000: 2, 1900: 2, 2100: 3, 4000: 3, 10**6: 3}
    assert forward.best(CPU, 1000)["tile"] == 1
    with forward.forced(tile=7):
        assert forward.best(GPU, 1000)["tile"] == 7
    assert forward.best(GPU, 1000)["tile"] == 2


def test_a_look_up_costs_little(table) -> None:
    forward = tunable("rms_norm.forward")
    forward.best(CPU, 768)
    look_up, plain = (
        min(timeit.repeat(call, number=1000, repeat=20, timer=time.process_time))
        for call in (lambda: forward.best(CPU, 768), lambda: int("768"))
    )
    assert look_up < 10 * plain  # 0.14 us against 0.10, each at its best of twenty: the machine may be busy


def fake_timer(best: dict[str, int], known: tuning.Tunable):
    """The candidate `best` takes 1 ms, the others 2; 8192 does not fit."""

    def milliseconds(run) -> float:
        if known._forced.get("tile") == 8192:
            raise torch.OutOfMemoryError("of registers")
        return 1.0 if known._forced == best else 2.0

    return milliseconds


def tune_with(monkeypatch, timer, known: tuning.Tunable) -> list:
    monkeypatch.setattr(tuning, "tunables", lambda op: [known])
    monkeypatch.setattr(known, "trial", lambda device, size: lambda: None)
    return list(tune.tune("rms_norm", GPU, timer))


def test_tuning_writes_what_is_faster_and_later_calls_use_it(table, monkeypatch) -> None:
    forward = tunable("rms_norm.forward")
    assert forward.best(GPU, 768) == {"tile": 4096}
    rows = tune_with(monkeypatch, fake_timer({"tile": 2048}, forward), forward)
    assert [row[1:] for row in rows] == [(size, "tile=2048", 2.0, 1.0) for size in forward.sizes]
    written = {str(size): {"tile": 2048} for size in forward.sizes}
    assert json.loads(table.read_text()) == {"rms_norm.forward": {"NVIDIA H100 80GB HBM3": written}}
    assert forward.best(GPU, 768) == {"tile": 2048} and forward.best(CPU, 768) == {"tile": 4096}
    assert f"{table}, for 1 kernels on NVIDIA H100 80GB HBM3" in tuning.table_in_use(GPU)
    assert [path.name for path in table.parent.iterdir()] == ["tuning.json"]  # no temporary file is left


def test_what_compiles_ahead_launches_each_candidate_on_the_same_inputs(monkeypatch) -> None:
    forward, launched, trials = tunable("rms_norm.forward"), [], []

    def trial(device, size):
        trials.append(size)
        return lambda: fake_timer({}, forward)(launched.append((size, forward._forced["tile"])))

    monkeypatch.setattr(tuning, "tunables", lambda op: [forward])
    monkeypatch.setattr(forward, "trial", trial)
    tune._trial.cache_clear()
    for size, tile in ((768, 2048), (768, 4096), (768, 8192), (1536, 2048)):
        tune._launch("rms_norm", forward.name, size, (("tile", tile),), GPU)
    assert launched == [(768, 2048), (768, 4096), (768, 8192), (1536, 2048)] and trials == [768, 1536]


def test_nothing_changes_for_a_gain_within_the_noise(table, monkeypatch) -> None:
    forward = tunable("rms_norm.forward")
    rows = tune_with(monkeypatch, lambda run: 1.0 if forward._forced["tile"] == 4096 else 0.99, forward)
    assert [row[2:] for row in rows] == [("tile=4096", 1.0, 1.0)] * len(forward.sizes)
    assert "the shipped table, " in tuning.table_in_use(torch.device("cpu"))


BROKEN = {
    "no json": ("{", "Expecting property name"),
    "another form": ("[1]", "'list' object has no attribute 'items'"),
    "an unknown tunable": ('{"fast": {}}', "it has rows of fast, which this release does not know"),
    "an unknown parameter": ('{"rms_norm.forward": {"any": {"any": {"tiles": 4}}}}', "its row any of rms_norm.forward"),
    "no number": ('{"rms_norm.forward": {"any": {"12": {"tile": "4"}}}}', "its row 12 of rms_norm.forward is"),
    "no size": ('{"rms_norm.forward": {"any": {"x": {"tile": 4}}}}', "invalid literal for int"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_is_told_once_and_ignored(kind: str, table, capfd) -> None:
    text, reason = BROKEN[kind]
    table.parent.mkdir(exist_ok=True)
    table.write_text(text)
    for _ in range(2):
        tuning.forget()
        assert tunable("rms_norm.forward").best(GPU, 768) == {"tile": 4096}
    said = capfd.readouterr().err
    assert said.startswith(f"statespan: {table} is not used ({reason}") and said.count("\n") == 1


def test_no_folder_to_write_to_is_told(table, monkeypatch) -> None:
    forward = tunable("rms_norm.forward")
    monkeypatch.setattr(tuning, "user_path", lambda: None)
    with pytest.raises(UserError, match="there is no folder to write the table to; set NUMBA_CACHE_DIR"):
        tune_with(monkeypatch, lambda run: 1.0, forward)


@pytest.mark.gpu
@pytest.mark.parametrize("known", EVERY, ids=lambda known: known.name)
def test_every_trial_can_be_built(known: tuning.Tunable) -> None:
    assert all(isinstance(choice, int) and choice > 0 for values in known.choices.values() for choice in values)
    if not torch.cuda.is_available() and "selective_scan" not in known.name:  # whose trial runs the forward
        assert callable(known.trial(torch.device("meta"), known.sizes[0]))
    if torch.cuda.is_available():
        known.trial(torch.device("cuda"), known.sizes[0])()
        torch.cuda.synchronize()
