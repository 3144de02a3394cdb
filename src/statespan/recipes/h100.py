"""Four byte models of about 100M active parameters, trained alike for five minutes on one H100.

    statespan train mamba_100m_h100 data.train=site-packages

`data.train` is a folder of source text. The tokens a step and the schedule are the same, and the width too, but for the
hybrid, whose experts hold more and which is narrower: the layers differ.
"""

from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, pattern_from_periods
from statespan.training.config import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)


def mamba_100m_h100() -> TrainingConfig:
    """Mamba-1 on bytes, 98M parameters, five minutes of an H100."""
    return _run(ModelConfig(hidden_size=768, layers=(LayerSpec("mamba1"),) * 26, mamba1=Mamba1Config()))


def mamba2_100m_h100() -> TrainingConfig:
    """Mamba-2 on bytes, 98M parameters, five minutes of an H100."""
    return _run(ModelConfig(hidden_size=768, layers=(LayerSpec("mamba2"),) * 26, mamba2=Mamba2Config()))


def jamba_100m_h100() -> TrainingConfig:
    """Jamba on bytes: one attention layer in eight, experts in every other; 94M of 177M active."""
    return _run(
        ModelConfig(
            hidden_size=640,
            layers=pattern_from_periods(16, attention_period=8, attention_offset=4, expert_period=2, expert_offset=1),
            mamba1=Mamba1Config(inner_norms=True),
            attention=AttentionConfig(num_heads=10, num_kv_heads=2, head_dim=64),
            mlp=MLPConfig(intermediate_size=1792),
            moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=896, load_balance_coef=0.01),
        ),
    )


def transformer_100m_h100() -> TrainingConfig:
    """Llama-style Transformer on bytes with rotary positions, 99M parameters, five minutes of an H100."""
    return _run(
        ModelConfig(
            hidden_size=768,
            layers=(LayerSpec("attention", "mlp"),) * 14,
            attention=AttentionConfig(num_heads=12, head_dim=64, rope_theta=10_000.0),
            mlp=MLPConfig(intermediate_size=2048),
        ),
        context_length=2048,  # rotary positions beyond are untrained
    )


def _run(model: ModelConfig, context_length: int | None = None) -> TrainingConfig:
    return TrainingConfig(
        model=model,
        data=DataConfig(sequence_length=2048, held_out_fraction=0.01, max_document_bytes=65_536),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.03),
        evaluation=EvaluationConfig(
            every_steps=250, max_bytes=524_288, context_length=context_length, chunk_length=2048
        ),
        run=RunConfig(
            max_steps=None,
            max_seconds=300,
            batch_size=16,
            precision="bfloat16",
            device="cuda",
            cuda_graph=True,
            keep_checkpoints=1,
        ),
    )
