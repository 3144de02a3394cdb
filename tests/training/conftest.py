"""Tiny texts, models and runs."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from statespan.layers.config import AttentionConfig, Mamba1Config, MoEConfig
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.training import DataConfig, EvaluationConfig, OptimizerConfig, RunConfig, TrainingConfig

WORDS = ("the cat ", "a dog ", "sat on ", "was it.\n", "naïve ")


@pytest.fixture
def make_text() -> Callable[[int, int], str]:
    """Text of so many words, by seed."""
    return lambda seed, words: "".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def folder(tmp_path: Path, make_text: Callable[[int, int], str]) -> Path:
    """A folder of 12 small text files of unequal length."""
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(12):
        (path / f"{i:02d}.txt").write_text(make_text(i, 5 + 7 * i), encoding="utf-8", newline="")
    return path


@pytest.fixture
def hybrid() -> ModelConfig:
    """Mamba, attention and experts at hidden size 16."""
    return ModelConfig(
        hidden_size=16,
        layers=(LayerSpec("mamba1"), LayerSpec("attention", "moe")),
        mamba1=Mamba1Config(state_size=4),
        attention=AttentionConfig(num_heads=2),
        moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=16, load_balance_coef=0.01, router_z_coef=0.001),
    )


@pytest.fixture
def config(folder: Path, hybrid: ModelConfig) -> TrainingConfig:
    """A run of 6 steps of 4 rows of 16 bytes, in two parts each."""
    return TrainingConfig(
        model=hybrid,
        data=DataConfig(train=str(folder), sequence_length=16, held_out_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        evaluation=EvaluationConfig(chunk_length=32),
        run=RunConfig(max_steps=6, batch_size=4, accumulation_steps=2, log_every=2, keep_checkpoints=10),
    )
