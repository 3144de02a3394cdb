"""Hybrids: Mamba with attention and mixture-of-experts layers."""

from statespan.layers.config import MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.presets import preset
from statespan.training.config import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig


def jamba_small_cpu() -> TrainingConfig:
    """Jamba on bytes, the preset jamba-demo: 8 layers, one of attention, every second with experts."""
    return TrainingConfig(
        model=preset("jamba-demo"),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every_steps=500, context_length=4096),  # attention over whole long files takes time
        run=RunConfig(max_steps=2000, batch_size=8, save_every=500),
    )


def moe_mamba_tiny_cpu() -> TrainingConfig:
    """MoE-Mamba on bytes (arXiv 2401.04081): Switch experts after every Mamba layer, one a token."""
    return TrainingConfig(
        model=ModelConfig(
            hidden_size=128,
            layers=(LayerSpec("mamba1", "moe"),) * 4,
            moe=MoEConfig(
                num_experts=8,
                top_k=1,
                intermediate_size=384,
                activation="relu",
                capacity_factor=1.0,
                load_balance_coef=0.01,
            ),
        ),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3, clip_norm=0.5),
        evaluation=EvaluationConfig(every_steps=250),
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )
