"""What RNN, Transformer, S4D and Mamba can and cannot learn: three tasks that tell them apart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from statespan.evaluation import TaskBatch, answer_accuracy, copying, induction_heads, selective_copying
from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Setting, Table
from statespan.lab.task_models import MODELS, task_model
from statespan.lab.task_training import TaskPlan, train_on_task
from statespan.models.build import build
from statespan.models.language_model import LanguageModel

TEST_SEED = 2**40
SOLVED = 0.99  # of the tokens: training ends
LEARNT = 95.0  # percent of the tokens: the task counts as learnt
TASKS = {
    "copying": "repeat what came at fixed places: a delay",
    "selective_copying": "repeat what came at random places in noise: needs selection",
    "induction_heads": "say what followed a token the last time: needs to compare",
}
VARIANTS = {name: MODELS[name] for name in ("lstm", "attention_rope", "s4d_in_mamba", "mamba", "hybrid")}


@dataclass(frozen=True, kw_only=True)
class TaskMatrixSetting(Setting):
    """Sizes of the tasks, the models and the training."""

    length: int = 128
    num_tokens: int = 8
    vocab_size: int = 16
    hidden_size: int = 64
    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    test_rows: int = 256
    look_every: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in TASKS:
            self.draw(task, 0, 1, "cpu")
        TaskPlan(self.steps, self.learning_rate)
        task_model("attention_rope", vocab_size=self.vocab_size, hidden_size=self.hidden_size)

    def draw(self, task: str, seed: int, rows: int, device: str | None = None) -> TaskBatch:
        """A batch of one of the tasks, on the setting's device or another."""
        place = device or self.device
        if task == "induction_heads":
            return induction_heads(seed, rows, length=self.length, vocab_size=self.vocab_size, device=place)
        make = copying if task == "copying" else selective_copying
        return make(
            seed, rows, length=self.length, num_tokens=self.num_tokens, vocab_size=self.vocab_size, device=place
        )


def run(setting: TaskMatrixSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """Train a fresh model on each task until it is right or the steps are over."""
    config = task_model(variant, vocab_size=setting.vocab_size, hidden_size=setting.hidden_size)
    plan = TaskPlan(
        setting.steps,
        setting.learning_rate,
        warmup_fraction=0.05,
        final_ratio=0.05,
        clip_norm=1.0,
        look_every=setting.look_every,
    )
    for index, name in enumerate(TASKS):
        model = build(config, seed=seed, device=setting.device)
        yield from learn(
            setting,
            model,
            name,
            plan,
            seed,
            lambda share, text, index=index: progress((index + share) / len(TASKS), text),
        )


def learn(
    setting: TaskMatrixSetting, model: LanguageModel, name: str, plan: TaskPlan, seed: int, progress: Progress
) -> list[Row]:
    """The rows of one task: accuracy along the way and at the end."""
    test, curve = setting.draw(name, TEST_SEED + seed, setting.test_rows), list[Row]()

    def look(step: int, loss: float) -> bool:
        right = answer_accuracy(model, test).tokens
        curve.append({"task": name, "step": step, "accuracy": 100 * right})
        return right >= SOLVED

    def draw(step: int, count: int) -> TaskBatch:
        return setting.draw(name, seed * setting.steps + step, count * setting.batch_size)

    steps = train_on_task(model, draw, plan, progress, look)
    return [*curve, {"task": name, "final": curve[-1]["accuracy"], "steps": steps}]


def report(setting: TaskMatrixSetting, rows: Sequence[Row]) -> Findings:
    """Who has learnt what."""
    present = [variant for variant in VARIANTS if table.values(rows, "final", variant=variant)]

    def learnt(variant: str, task: str) -> bool | None:
        """By every seed."""
        found = table.values(rows, "final", variant=variant, task=task)
        return min(found) >= LEARNT if found else None

    def not_learnt(variant: str, task: str) -> bool | None:
        """By no seed."""
        found = table.values(rows, "final", variant=variant, task=task)
        return max(found) < LEARNT if found else None

    checks = [
        Check(
            f"Mamba learns all three ({LEARNT:g}% of the tokens)", table.all_of(*(learnt("mamba", t) for t in TASKS))
        ),
        Check("S4D learns copying", learnt("s4d_in_mamba", "copying")),
        Check("S4D does not learn selective copying", not_learnt("s4d_in_mamba", "selective_copying")),
        Check("S4D does not learn induction heads", not_learnt("s4d_in_mamba", "induction_heads")),
    ]
    cells = [
        [
            VARIANTS[variant],
            *(
                f"{table.spread(rows, 'final', variant=variant, task=task)} at "
                f"{table.mean_of(rows, 'steps', variant=variant, task=task):,.0f} steps"
                for task in TASKS
            ),
        ]
        for variant in present
    ]
    plots = [
        Plot(
            task,
            "steps",
            "right tokens, %",
            [table.line(variant, rows, "step", "accuracy", variant=variant, task=task) for variant in present],
        )
        for task in TASKS
    ]
    columns = ["model", *(f"{task}: {what}" for task, what in TASKS.items())]
    return Findings(checks, [Table("Right tokens in percent", columns, cells)], plots)


H100 = TaskMatrixSetting(
    time="2 minutes of an H200, 8 units side by side",
    variants=tuple(VARIANTS),
    seeds=3,
    device="cuda",
    steps=6000,
    learning_rate=2e-3,
    look_every=250,
)
CPU = replace(
    H100,
    time="60 s of 2 cores",
    variants=("lstm", "s4d_in_mamba", "mamba"),
    seeds=1,
    device="cpu",
    length=24,
    num_tokens=3,
    vocab_size=6,
    hidden_size=48,
    steps=400,
    batch_size=32,
    learning_rate=3e-3,
    test_rows=128,
    look_every=50,
)

EXPERIMENT = Experiment(
    name="task_matrix",
    title="What each family can learn",
    claim="A linear time-invariant model learns delays, but neither to skip noise nor to look something up. Mamba "
    "learns all of it, with a state of fixed size as an RNN.",
    source="Mamba, arXiv 2312.00752, sections 3.1 and 4.1",
    settings={
        "cpu": CPU,
        "h100": H100,
        "tiny": replace(
            CPU,
            time="a second",
            variants=("lstm", "mamba"),
            length=6,
            num_tokens=2,
            hidden_size=16,
            steps=3,
            batch_size=2,
            test_rows=3,
            look_every=2,
        ),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    notes={
        "cpu": "Short rows, few kinds of tokens and a few hundred steps. At this length S4D, with 64 states a channel "
        "and a gate that sees the input, learns what it does not at the published lengths. Copying over a fixed "
        "distance is where LSTM and Mamba start slowly: no token is near its answer, while S4D's kernel spans the "
        "distance at once. Attention alone needs more steps than this.",
        "h100": "At 128 tokens S4D, with a conv and a gate that see the input beside it, answers induction heads at "
        "the length it was trained on, and most of selective copying: what it cannot shows at 4,096 places "
        "(selective_copying) and beyond the length of training (induction_heads). The LSTM does not find the delay.",
    },
)
