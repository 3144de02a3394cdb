"""TrainingConfig: JSON in and out, overrides, and refusals that name the field."""

import json
from pathlib import Path

import pytest

from statespan.errors import UnknownName, UserError
from statespan.training import TrainingConfig


def test_json_round_trip(config: TrainingConfig, tmp_path: Path):
    changed = config.override(["schedule.kind=wsd", "run.max_seconds=60", 'data.exclude=["a/*"]', "model.moe.top_k=1"])
    assert TrainingConfig.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    changed.save(tmp_path)
    assert TrainingConfig.load(tmp_path) == changed
    assert TrainingConfig.load(tmp_path) != config


def test_override_reaches_every_level(config: TrainingConfig):
    changed = config.override(
        ["run.max_steps=null", "run.max_seconds=2.5", "optimizer.betas=[0.8, 0.9]", "data.train=a b.txt"]
    )
    assert (changed.run.max_steps, changed.run.max_seconds) == (None, 2.5)
    assert changed.optimizer.betas == (0.8, 0.9)
    assert changed.data.train == "a b.txt"
    assert config.override(['data.train=["a.txt", "b.txt"]']).data.train == ("a.txt", "b.txt")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("run.max_step=3", "max_steps"),
        ("optimiser.learning_rate=1", "optimizer"),
        ("schedule.kind=cosin", "cosine"),
        ("model.moe.top_k=many", "TrainingConfig.model.moe.top_k"),
        ("run.batch_size=0", "run.batch_size must be at least 1"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm"),
        ("data.held_out_fraction=1", "data.held_out_fraction"),
        ("data.sequence_length=1", "data.sequence_length"),
        ("data.max_document_bytes=0", "data.max_document_bytes"),
        ("schedule.final_ratio=2", "schedule.final_ratio"),
        ("evaluation.chunk_length=0", "evaluation.chunk_length"),
        ("evaluation.context_length=1", "evaluation.context_length"),
        ("run.max_seconds=0", "run.max_seconds"),
        ("run.log_every", "key=value"),
    ],
)
def test_bad_overrides_name_the_field(config: TrainingConfig, assignment: str, message: str):
    with pytest.raises(UserError) as error:
        config.override([assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["run.max_steps=null"], "run.max_steps or run.max_seconds"),
        (["run.accumulation_steps=3"], "accumulation_steps 3 must divide run.batch_size 4"),
        (["schedule.kind=wsd", "schedule.decay_fraction=0.99", "schedule.warmup_fraction=0.5"], "at most 1"),
        (["data.train=[]"], "data.train is empty"),
        (['model.layers=["s4d", "mlp"]', "run.cuda_graph=true"], "cannot capture s4d layers"),
    ],
)
def test_check_refuses_fields_that_disagree(config: TrainingConfig, assignments: list[str], message: str):
    config.check()
    with pytest.raises(UserError, match=message):
        config.override(assignments).check()


def test_load_refuses_what_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"no run directory"):
        TrainingConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        TrainingConfig.load(tmp_path)
    (tmp_path / "config.json").write_text('{"rum": {}}')
    with pytest.raises(UnknownName, match="run"):
        TrainingConfig.load(tmp_path)
