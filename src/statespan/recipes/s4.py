"""The linear time-invariant foundations: S4D."""

from statespan.layers.config import MLPConfig, S4DConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.training.config import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig


def s4d_tiny_cpu() -> TrainingConfig:
    """S4D with MLPs on bytes, 0.6M parameters: what can be learnt without selection."""
    return TrainingConfig(
        model=ModelConfig(
            hidden_size=128,
            layers=(LayerSpec("s4d", "mlp"),) * 3,
            s4d=S4DConfig(state_size=64, init="lin"),
            mlp=MLPConfig(intermediate_size=344),
        ),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every_steps=250),
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )
