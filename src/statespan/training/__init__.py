"""Training: data, packing, the loop, evaluation, metrics, checkpoints. `train(config, run_directory)` is the entry."""

from statespan.training.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from statespan.training.evaluation import EvaluationResult, evaluate
from statespan.training.metrics import read_metrics
from statespan.training.progress import ProgressDisplay
from statespan.training.run import TrainingResult, train

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "EvaluationResult",
    "OptimizerConfig",
    "ProgressDisplay",
    "RunConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "read_metrics",
    "train",
]
