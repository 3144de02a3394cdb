"""The demo's run: model, optimizer and rows, tuned for the lowest held-out figure in minutes on two cores."""

from pathlib import Path

from statespan.models.presets import preset
from statespan.training import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)


def demo_config(corpus: Path, *, seed: int, minutes: float) -> TrainingConfig:
    """Train jamba-demo on `corpus`/train for `minutes`, then evaluate all of `corpus`/held-out.

    The learning rate follows the clock: a run of any length ends with it decayed.
    """
    return TrainingConfig(
        model=preset("jamba-demo"),
        data=DataConfig(train=str(corpus / "train"), held_out=str(corpus / "held-out"), sequence_length=256, seed=seed),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        schedule=ScheduleConfig("cosine", warmup_fraction=0.03, final_ratio=0.02),
        evaluation=EvaluationConfig(),
        run=RunConfig(seed=seed, max_steps=None, max_seconds=60 * minutes, batch_size=8, log_every=5),
    )
