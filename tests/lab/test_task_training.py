"""Training on a task: the batches it draws, the looks it takes, and that a model learns."""

from dataclasses import replace

import pytest
import torch

from statespan.errors import NonFiniteLoss, UserError
from statespan.evaluation import TaskBatch, answer_accuracy, associative_recall, copying, induction_heads, phonebook
from statespan.lab.induction_heads import InductionSetting
from statespan.lab.task_models import LAYERS, MODELS, task_model
from statespan.lab.task_training import TaskPlan, TaskSetting, task_loss, train_on_task
from statespan.models.build import build

QUIET = lambda share, text: None  # noqa: E731  a progress that shows nothing
GPUS = ["cuda"] if torch.cuda.is_available() else []


def test_a_model_learns_to_copy() -> None:
    model = build(task_model("mamba", vocab_size=6, hidden_size=32), seed=0)
    test = copying(10**6, 64, length=6, num_tokens=2, vocab_size=6)
    before = answer_accuracy(model, test).tokens
    looks: list[tuple[int, float]] = []
    steps = train_on_task(
        model,
        lambda step, count: copying(step, 16, length=6, num_tokens=2, vocab_size=6),
        TaskPlan(150, 1e-2, final_ratio=0.1, look_every=40),
        QUIET,
        lambda step, loss: looks.append((step, loss)) or False,
    )
    assert steps == 150 and [step for step, _ in looks] == [40, 80, 120, 150]
    assert before < 0.5 and answer_accuracy(model, test).tokens > 0.95
    assert looks[-1][1] < looks[0][1] / 4


def test_steps_are_those_of_adamw_by_hand() -> None:
    """Two steps against torch's optimizer on the same losses, with clipping and a falling rate."""

    def draw(step: int, count: int) -> TaskBatch:
        return induction_heads(step, 4, length=6, vocab_size=5)

    config = task_model("lstm", vocab_size=5, hidden_size=8)
    model, other = build(config, seed=3), build(config, seed=3)
    plan = TaskPlan(2, 0.1, weight_decay=0.0, clip_norm=0.01, final_ratio=0.5, beta2=0.99)
    train_on_task(model, draw, plan, QUIET)
    optimizer = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step, rate in enumerate((0.1 * 0.75, 0.1 * 0.5)):  # a cosine from 1 to 0.5 at half and whole
        batch = draw(step, 1)
        logits = other(batch.input_ids).logits
        assert logits is not None
        torch.nn.functional.cross_entropy(logits[:, -2], batch.labels[:, -1]).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        induction_heads(0, 3, length=9),
        copying(1, 3, length=9, num_tokens=3),
        associative_recall(2, 3, length=16, num_pairs=3, vocab_size=16),
        phonebook(3, 2, num_entries=3, num_queries=2),
    ],
    ids=["one", "last", "scattered", "groups"],
)
def test_the_loss_is_that_of_the_labels(batch: TaskBatch) -> None:
    """Of the head at the asked places alone, against the model's own over all places."""
    vocab_size = int(batch.input_ids.max()) + 2
    model = build(task_model("mamba", vocab_size=vocab_size, hidden_size=16), seed=1)
    loss, want = task_loss(model)(batch.input_ids, *batch.asked()), model(batch.input_ids, labels=batch.labels).loss
    assert want is not None  # labels were given
    torch.testing.assert_close(loss, want)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, want)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_batches_end_where_the_next_rows_are_of_another_kind() -> None:
    """Steps of two lengths in turns, drawn one at a time, are all made."""
    model = build(task_model("mamba", vocab_size=5, hidden_size=8), seed=0)
    drawn: list[int] = []

    def draw(step: int, count: int) -> TaskBatch:
        drawn.append(step)
        return induction_heads(step, 2, length=6 + step % 2, vocab_size=5)

    assert train_on_task(model, draw, TaskPlan(5, 1e-3, look_every=3), QUIET) == 5
    assert drawn == [0, 0, 1, 2, 3, 4]  # the first tells how many rows a step has


def test_a_look_may_end_it() -> None:
    model = build(task_model("mamba", vocab_size=4, hidden_size=8), seed=0)
    plan = TaskPlan(50, 1e-3, look_every=3)
    draw = lambda step, count: induction_heads(step, 2, length=5, vocab_size=4)  # noqa: E731  one line says it
    assert train_on_task(model, draw, plan, QUIET, lambda step, loss: step == 6) == 6


def test_a_loss_that_is_no_number_is_told() -> None:
    model = build(task_model("mamba", vocab_size=4, hidden_size=8), seed=0)
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="not finite at step 2"):
        train_on_task(
            model, lambda step, count: induction_heads(step, 2, length=5, vocab_size=4), TaskPlan(2, 1e-3), QUIET
        )


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("name", ["mamba", "mamba2", "attention_rope", "s4d_in_mamba", "hybrid"])
def test_captured_training_equals_the_host(device: str, name: str) -> None:
    config = task_model(name, vocab_size=16, hidden_size=64)
    trained = []
    for place in ("cpu", device):
        model = build(config, seed=0, device=place)
        losses: list[float] = []
        train_on_task(
            model,
            lambda step, count: induction_heads(step, 8, length=32),
            TaskPlan(6, 1e-3, look_every=1),
            QUIET,
            lambda step, loss, losses=losses: losses.append(loss) or False,
        )
        trained.append(losses)
    assert trained[0] == pytest.approx(trained[1], rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_tasks_runs(name: str) -> None:
    config = task_model(name, vocab_size=9, hidden_size=32)
    assert tuple(spec.mixer for spec in config.layers) == LAYERS[name]
    logits = build(config)(torch.zeros(1, 5, dtype=torch.int64)).logits
    assert logits is not None and logits.isfinite().all()


def test_s6_stands_in_the_blocks_of_its_names() -> None:
    blocks = {name: task_model(name, vocab_size=9, hidden_size=32, state_size=8).s6 for name in ("s6", "h3_s6")}
    assert {name: config.block for name, config in blocks.items()} == {"s6": "glu", "h3_s6": "h3"}
    assert {config.state_size for config in blocks.values()} == {8}


def test_a_setting_says_how_each_variant_is_trained() -> None:
    setting = InductionSetting(time="", variants=("mamba",), steps=7, other_steps=5, learning_rate=1e-3)
    mamba, hybrid, others = (setting.plan_of(name) for name in ("mamba", "hybrid", "h3"))
    assert (mamba.steps, mamba.learning_rate, mamba.warmup_fraction, mamba.beta2) == (7, 3e-3, 0.01, 0.999)
    assert (hybrid.steps, hybrid.learning_rate, hybrid.beta2) == (5, 1e-3, 0.95)
    assert others == replace(hybrid, learning_rate=2e-4)
    alike = replace(setting, mamba_learning_rate=None, mamba_warmup_fraction=None, mamba_beta2=None)
    assert alike.plan_of("mamba") == replace(hybrid, steps=7)


def test_bad_sizes_get_one_line() -> None:
    with pytest.raises(UserError, match="precision must be float32 or bfloat16, got 'float16'"):
        TaskSetting(time="", variants=("a",), precision="float16")
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        TaskPlan(0, 1e-3)
    with pytest.raises(UserError, match="hidden_size and state_size must be at least 1, got 8 and 0"):
        task_model("mamba", vocab_size=4, hidden_size=8, state_size=0)
