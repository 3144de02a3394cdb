"""MoE-Mamba: how many experts, at the same work a token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from statespan.lab import rows as table
from statespan.lab.experiment import Check, Experiment, Findings, Plot, Progress, Row, Table
from statespan.lab.text_training import TextSetting, train_on_text
from statespan.layers.config import MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

VARIANTS = {
    "none": "Mamba alone",
    "e1": "1 expert",
    "e4": "4 experts",
    "e8": "8 experts",
    "e16": "16 experts",
    "e32": "32 experts",
}
PUBLISHED = {  # log-perplexity after 1B tokens, and steps saved; arXiv 2401.04081, table of the number of experts
    "none": ("3.72", "1"),
    "e1": ("3.75", "less than 1"),
    "e4": ("3.72", "1.03"),
    "e8": ("3.70", "1.10"),
    "e16": ("3.67", "1.21"),
    "e32": ("3.67", "1.23"),
}


@dataclass(frozen=True, kw_only=True)
class ExpertsSetting(TextSetting):
    """Size of the models."""

    hidden_size: int = 256
    num_pairs: int = 6  # of Mamba and experts; Mamba alone has twice as many layers instead


def model_config(setting: ExpertsSetting, variant: str) -> ModelConfig:
    """Experts of two matrices and 3 times the width: 6 d^2 a token, as a Mamba layer; one a token, as in Switch."""
    if variant == "none":
        return ModelConfig(hidden_size=setting.hidden_size, layers=(LayerSpec("mamba1"),) * 2 * setting.num_pairs)
    return ModelConfig(
        hidden_size=setting.hidden_size,
        layers=(LayerSpec("mamba1", "moe"),) * setting.num_pairs,
        moe=MoEConfig(
            num_experts=int(variant.removeprefix("e")),
            top_k=1,
            intermediate_size=3 * setting.hidden_size,
            activation="relu",
            capacity_factor=1.0,
            load_balance_coef=0.01,
        ),
    )


def run(setting: ExpertsSetting, variant: str, seed: int, progress: Progress) -> Iterator[Row]:
    """Train one variant."""
    _, rows = train_on_text(setting, model_config(setting, variant), seed, progress)
    yield from rows


def steps_to(curve: Sequence[tuple[float, float]], target: float, settled: int = 3) -> float | None:
    """The steps after which a curve of (step, loss), smoothed over `settled` points, first is at most `target`."""
    for index in range(settled - 1, len(curve)):
        window = curve[index - settled + 1 : index + 1]
        if sum(loss for _, loss in window) / settled <= target:
            return curve[index][0]
    return None


def speedup(rows: Sequence[Row], variant: str) -> float | None:
    """Steps of Mamba alone / steps of the variant, to the loss at which Mamba alone ends; the mean over the seeds."""
    found: list[float] = []
    for seed in {row["seed"] for row in rows}:
        plain, mine = (
            [
                (row["step"], row["bits_per_byte"])
                for row in table.of(rows, variant=v, seed=seed)
                if "bits_per_byte" in row
            ]
            for v in ("none", variant)
        )
        if len(plain) < 3 or len(mine) < 3:
            continue
        target = sum(loss for _, loss in plain[-3:]) / 3
        reached = steps_to(mine, target)
        if reached is not None:
            found.append(plain[-1][0] / reached)
    return table.mean(found)


def report(setting: ExpertsSetting, rows: Sequence[Row]) -> Findings:
    """Held-out figures and steps to equal loss beside the published ones."""
    present = [variant for variant in VARIANTS if table.values(rows, "held_out", variant=variant)]
    bits = {variant: table.mean_of(rows, "held_out", variant=variant) for variant in VARIANTS}

    def better(first: str, second: str) -> bool | None:
        return table.ordered(bits[second], bits[first])

    checks = [
        Check("one expert is no better than none", better("none", "e1")),
        Check("8 experts are better than one", better("e8", "e1")),
        Check("32 experts are better than 8", better("e32", "e8")),
        Check("32 experts are better than none", better("e32", "none")),
    ]
    cells = [
        [
            VARIANTS[variant],
            table.spread(rows, "held_out", 3, variant=variant),
            PUBLISHED[variant][0],
            "1" if variant == "none" else None if (saved := speedup(rows, variant)) is None else f"{saved:.2f}",
            PUBLISHED[variant][1],
            f"{max(table.values(rows, 'parameters', variant=variant)):,}",
        ]
        for variant in present
    ]
    columns = [
        "model",
        "held-out bits per byte",
        "published log-perplexity",
        "steps of Mamba / steps to its last loss",
        "published",
        "parameters",
    ]
    curves = [table.line(variant, rows, "step", "bits_per_byte", variant=variant) for variant in present]
    return Findings(checks, [Table("", columns, cells)], [Plot("Training text", "steps", "bits per byte", curves)])


H100 = ExpertsSetting(
    time="50 minutes of an H100 (estimated); 2.5 minutes a variant and seed",
    variants=tuple(VARIANTS),
    seeds=3,
    device="cuda",
    sequence_length=1024,
)
CPU = replace(
    H100,
    time="60 s of 2 cores",
    variants=("none", "e1", "e8"),
    seeds=1,
    device="cpu",
    precision="float32",
    hidden_size=64,
    num_pairs=2,
    sequence_length=256,
    batch_size=8,
    steps=250,
    learning_rate=4e-3,
    held_out_bytes=65_536,
    log_every=10,
)

EXPERIMENT = Experiment(
    name="experts",
    title="Experts beside Mamba",
    claim="Experts in every second layer, one a token and so at the same work, save steps: more with more experts. "
    "A single expert, an MLP, saves none.",
    source="MoE-Mamba, arXiv 2401.04081, section on the number of experts",
    settings={
        "cpu": CPU,
        "h100": H100,
        "tiny": replace(
            CPU,
            time="seconds",
            variants=("none", "e4"),
            hidden_size=16,
            num_pairs=1,
            sequence_length=32,
            batch_size=2,
            steps=4,
            held_out_bytes=2000,
            log_every=1,
        ),
    },
    variants=VARIANTS,
    run=run,
    report=report,
    notes={
        "cpu": "A few hundred steps: experts have seen too few tokens each to tell them apart. The paper itself gains "
        "3 to 23% of the steps after a billion tokens.",
        "h100": "The paper's 2.35 times fewer steps come after 30 billion tokens; its own table after one billion is "
        "what this setting, with 100 million bytes, can be compared with.",
    },
)
