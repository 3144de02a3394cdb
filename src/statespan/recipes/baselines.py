"""The baselines: Transformer, LSTM and GRU, near mambabyte_tiny_cpu in parameters and trained the same way."""

from statespan.layers.config import AttentionConfig, MLPConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, MixerName
from statespan.training.config import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig


def transformer_tiny_cpu() -> TrainingConfig:
    """Llama-style Transformer on bytes with rotary positions, 0.6M parameters."""
    return TrainingConfig(
        model=ModelConfig(
            hidden_size=128,
            layers=(LayerSpec("attention", "mlp"),) * 3,
            attention=AttentionConfig(num_heads=4, rope_theta=10_000.0),
            mlp=MLPConfig(intermediate_size=344),
        ),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every_steps=250, context_length=512),  # rotary positions beyond are untrained
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )


def lstm_tiny_cpu() -> TrainingConfig:
    """Residual LSTM layers on bytes, 0.6M parameters."""
    return _recurrent("lstm", 4)


def gru_tiny_cpu() -> TrainingConfig:
    """Residual GRU layers on bytes, 0.5M parameters."""
    return _recurrent("gru", 5)


def _recurrent(mixer: MixerName, depth: int) -> TrainingConfig:
    return TrainingConfig(
        model=ModelConfig(hidden_size=128, layers=(LayerSpec(mixer),) * depth),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every_steps=250),
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )
