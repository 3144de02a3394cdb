"""Mamba-1 and Mamba-2."""

from statespan.layers.config import Mamba2Config
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.presets import preset
from statespan.training.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)


def mambabyte_tiny_cpu() -> TrainingConfig:
    """Mamba-1 on bytes, 0.5M parameters: the smallest thing that learns to spell."""
    return TrainingConfig(
        model=ModelConfig(hidden_size=128, layers=(LayerSpec("mamba1"),) * 4),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every_steps=250),
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )


def mamba2_tiny_cpu() -> TrainingConfig:
    """Mamba-2 on bytes, 0.5M parameters."""
    return TrainingConfig(
        model=ModelConfig(
            hidden_size=128, layers=(LayerSpec("mamba2"),) * 4, mamba2=Mamba2Config(state_size=32, head_dim=32)
        ),
        data=DataConfig(sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(every_steps=250),
        run=RunConfig(max_steps=1000, batch_size=8, save_every=250),
    )


def mamba_130m_cpu() -> TrainingConfig:
    """Mamba-130m with a tokenizer.json of the user's (the paper's is GPT-NeoX's), in bfloat16 autocast.

    Learning rate, warm-up, decay, betas and clipping are the paper's (arXiv 2312.00752, appendix E.2).
    """
    return TrainingConfig(
        model=preset("mamba-130m"),
        data=DataConfig(tokenizer="tokenizer.json", sequence_length=512),
        optimizer=OptimizerConfig(learning_rate=3e-3),  # 5 times GPT-3's, appendix E.2.1
        schedule=ScheduleConfig("cosine", warmup_fraction=0.1, final_ratio=0.01),
        evaluation=EvaluationConfig(every_steps=500),
        run=RunConfig(max_steps=5000, batch_size=8, accumulation_steps=4, precision="bfloat16", save_every=500),
    )
