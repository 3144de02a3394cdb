"""An update: its loss, gradient, learning rate and counts, in parts and packed; and a loss that falls."""

import json
import math
from dataclasses import replace

import pytest
import torch

from statespan.checkpoints import ByteTokenizer
from statespan.errors import NonFiniteLoss
from statespan.models.build import build
from statespan.training import TrainingConfig
from statespan.training.data import load_data
from statespan.training.optimizer import build_optimizer
from statespan.training.packing import DataPosition, PackedRows
from statespan.training.trainer import Trainer


def make_trainer(config: TrainingConfig) -> Trainer:
    corpus, _ = load_data(config.data, ByteTokenizer())
    model = build(config.model, seed=config.run.seed)
    rows = PackedRows(corpus, config.data.sequence_length, config.data.seed)
    return Trainer(config, model, build_optimizer(model, config.optimizer), rows)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def without_experts(config: TrainingConfig) -> TrainingConfig:
    """Load balancing is no mean over rows, so that it tells parts from the whole; here it must not."""
    return config.override(["model.moe.load_balance_coef=0", "model.moe.router_z_coef=0"])


def test_parts_add_up_to_the_batch(config: TrainingConfig):
    config = without_experts(config).override(["data.sequence_length=64"])
    rows = make_trainer(config).rows
    counts = [rows.batch(DataPosition(0, row), 1)[0].num_predicted for row in range(4)]
    assert len(set(counts)) > 1  # a mean of the parts' means would not do
    trained = {}
    for parts in (1, 2, 4):
        trainer = make_trainer(config.override([f"run.accumulation_steps={parts}"]))
        trainer.model.double()
        rows = [trainer.step()[0] for _ in range(3)]
        trained[parts] = (weights(trainer), trainer.state.totals, rows)
    for parts in (2, 4):
        assert trained[parts][1].num_predicted == trained[1][1].num_predicted
        assert trained[parts][1].nats == pytest.approx(trained[1][1].nats, rel=1e-5)
        for one, other in zip(trained[1][2], trained[parts][2], strict=True):
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
        for name, weight in trained[1][0].items():
            torch.testing.assert_close(trained[parts][0][name], weight, rtol=1e-5, atol=1e-7, msg=name)


def test_a_packed_batch_is_its_documents_one_by_one(config: TrainingConfig):
    trainer = make_trainer(without_experts(config).override(["data.sequence_length=64"]))
    trainer.model.double().train()
    part, _ = trainer.rows.batch(trainer.state.position, 4)
    assert part.segments is not None
    packed, _, _ = trainer._forward(*trainer._inputs(part))
    nats, count = 0.0, 0
    for ids, segments in zip(part.input_ids, part.segments, strict=True):
        for number in segments.unique():
            document = ids[segments == number][None]
            if document.shape[1] > 1:
                nats += trainer.model(document, labels=document).loss.item() * (document.shape[1] - 1)
                count += document.shape[1] - 1
    assert count == part.num_predicted
    assert packed.item() == pytest.approx(nats / count, rel=1e-6)


def test_first_update_by_hand(config: TrainingConfig):
    config = config.override(["run.accumulation_steps=1", "schedule.warmup_fraction=0.5", "optimizer.clip_norm=0.01"])
    trainer = make_trainer(config)
    reference = build(config.model, seed=config.run.seed).train()
    part, position = trainer.rows.batch(trainer.state.position, config.run.batch_size)
    output = reference(part.input_ids, segments=part.segments, labels=part.input_ids)
    assert output.aux_loss.item() > 0
    (output.loss + output.aux_loss).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
    row, router = trainer.step()
    learning_rate = config.optimizer.learning_rate / 3  # the first of the 3 steps of warm-up
    assert row == {
        "learning_rate": pytest.approx(learning_rate),
        "gradient_norm": pytest.approx(norm, rel=1e-4),
    }
    for name, weight in reference.named_parameters():
        clipped = weight.grad * 0.01 / norm
        decay = 0.1 if name.endswith("in_proj.weight") else 0.0
        if decay or name == "embedding.weight":
            wanted = weight * (1 - learning_rate * decay) - learning_rate * clipped / (clipped.abs() + 1e-8)
            torch.testing.assert_close(dict(trainer.model.named_parameters())[name], wanted, rtol=1e-3, atol=1e-6)
    assert trainer.state.totals.nats == pytest.approx(output.loss.item() * part.num_predicted, rel=1e-5)
    assert trainer.state.totals.aux_loss == pytest.approx(output.aux_loss.item(), rel=1e-5)
    assert (trainer.state.totals.num_bytes, trainer.state.totals.num_tokens) == (part.num_bytes, 64)
    assert (trainer.state.step, trainer.state.num_tokens, trainer.state.position) == (1, 64, position)
    assert len(router) == 1
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_norm_within_the_limit_is_left_alone(config: TrainingConfig):
    found = []
    for limit in ("null", "1e6", "1e-3"):
        trainer = make_trainer(config.override([f"optimizer.clip_norm={limit}"]))
        norms = [trainer.step()[0]["gradient_norm"] for _ in range(2)]
        assert 1e-3 < norms[0] < 1e6
        found.append(weights(trainer))
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())
    assert not all(torch.equal(weight, found[2][name]) for name, weight in found[0].items())


def test_loss_falls(config: TrainingConfig):
    config = config.override(
        ["run.max_steps=60", "run.batch_size=8", "run.accumulation_steps=1", "optimizer.learning_rate=0.01"]
    )
    rows = []
    trainer = make_trainer(config)
    trainer.run(on_metrics=rows.append, on_evaluation=lambda: 0, on_checkpoint=lambda: 0, should_stop=lambda: False)
    assert rows[0]["loss"] > 4.5  # near ln 256 at first
    assert rows[-1]["loss"] < 2.2
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["loss"] / math.log(2))
    assert rows[-1]["learning_rate"] == pytest.approx(0.001)


def test_run_calls_back_at_its_times(config: TrainingConfig):
    config = config.override(["run.max_steps=7", "run.log_every=3", "run.save_every=2", "evaluation.every_steps=3"])
    trainer, calls = make_trainer(config), []

    def note(kind: str):
        return lambda row=None: calls.append((kind, trainer.state.step))

    trainer.run(
        on_metrics=note("log"), on_evaluation=note("eval"), on_checkpoint=note("save"), should_stop=lambda: False
    )
    assert calls == [
        *[("save", 2), ("log", 3), ("eval", 3), ("save", 4)],
        *[("log", 6), ("eval", 6), ("save", 6), ("log", 7)],  # the end is the caller's
    ]
    trainer = make_trainer(config)
    trainer.run(on_metrics=print, on_evaluation=print, on_checkpoint=print, should_stop=lambda: trainer.state.step == 2)
    assert trainer.state.step == 2


def test_metrics_cover_the_steps_since_the_last_row(config: TrainingConfig):
    rows, trainer = [], make_trainer(config)
    trainer.run(on_metrics=rows.append, on_evaluation=print, on_checkpoint=print, should_stop=lambda: False)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["tokens"] for row in rows] == [128, 256, 384]
    assert rows[2]["seconds"] > rows[1]["seconds"] > 0
    assert rows[2]["tokens_per_s"] == pytest.approx(128 / (rows[2]["seconds"] - rows[1]["seconds"]), rel=1e-3)
    assert len(rows[0]["layers.1.expert_share"]) == 4
    assert sum(rows[0]["layers.1.expert_share"]) == pytest.approx(1.0)
    assert rows[0]["aux_loss"] > 0
    assert trainer.state.totals.num_steps == 0


def test_time_budget_ends_the_run_and_drives_the_schedule(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1000))  # each look at the clock is a second later: a step looks three times and takes two
    monkeypatch.setattr("statespan.training.trainer.time.perf_counter", lambda: float(next(clock)))
    config = config.override(
        [
            *("run.max_steps=null", "run.max_seconds=10", "run.log_every=1", "schedule.kind=wsd"),
            *("schedule.warmup_fraction=0.1", "schedule.decay_fraction=0.6", "schedule.final_ratio=0"),
        ]
    )
    rows, trainer = [], make_trainer(config)
    trainer.run(on_metrics=rows.append, on_evaluation=print, on_checkpoint=print, should_stop=lambda: False)
    assert [row["seconds"] for row in rows] == [2, 4, 6, 8, 10]
    shares = [row["learning_rate"] / config.optimizer.learning_rate for row in rows]
    assert shares == pytest.approx([1, 1, 0.5 / 0.6, 0.3 / 0.6, 0.1 / 0.6])  # at 1, 3, 5, 7 and 9 seconds


@pytest.mark.parametrize("setting", ["run.activation_checkpointing=true", "run.precision=bfloat16"])
def test_options_of_arithmetic(config: TrainingConfig, setting: str):
    plain, other = make_trainer(config), make_trainer(config.override([setting]))
    for trainer in (plain, other):
        trainer.step()
    assert other.state.totals.nats == pytest.approx(plain.state.totals.nats, rel=1e-3)
    same = all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))
    assert same == setting.startswith("run.activation")
    assert {p.dtype for p in other.model.parameters()} == {torch.float32}


def test_rows_that_predict_nothing_change_nothing(tmp_path, config: TrainingConfig):
    documents = [chr(97 + i) for i in range(20)] + ["xyz"]  # a letter has nothing before it and nothing after it
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    data = replace(config.data, train=str(tmp_path / "letters.jsonl"), held_out_fraction=0.0, sequence_length=4)
    trainer = make_trainer(replace(config, data=data).override(["run.batch_size=2"]))
    predicted = []
    while trainer.state.position.epoch == 0:
        before = weights(trainer)
        row, _ = trainer.step()
        predicted.append(trainer.state.totals.num_predicted - sum(predicted))
        changed = any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
        assert changed == (row["gradient_norm"] > 0) == (predicted[-1] > 0)
    assert 0 in predicted and sum(predicted) > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_bad_weights_name_step_and_layer_and_change_nothing(config: TrainingConfig, parts: int):
    trainer = make_trainer(config.override([f"run.accumulation_steps={parts}"]))
    trainer.step()
    with torch.no_grad():
        trainer.model.layers[1].feed_forward.experts.up_proj[2, 3] = float("inf")
    before = weights(trainer)
    with pytest.raises(NonFiniteLoss) as error:
        for _ in range(5):
            trainer.step()
    assert "the parameter backbone.layers.1.feed_forward.experts.up_proj" in str(error.value)
    assert f"of step {trainer.state.step + 1} is not finite" in str(error.value)
    assert "\n" not in str(error.value)
    assert trainer.state.step == 1
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_overflow_in_a_layer_is_found(config: TrainingConfig):
    trainer = make_trainer(config)
    with torch.no_grad():  # finite weights whose product is not
        trainer.model.layers[0].mixer.in_proj.weight.fill_(3e38)
    with pytest.raises(NonFiniteLoss, match=r"the loss of step 1 .* the output of backbone\.layers\.0\.mixer"):
        trainer.step()


def test_bad_gradient_is_found(config: TrainingConfig):
    trainer = make_trainer(config)
    weight = trainer.model.layers[0].mixer.out_proj.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"the gradient of step 1 .* the gradient of backbone\.layers\.0\.mixer"):
        trainer.step()
    assert trainer.state.step == 0
