"""Accuracy is the share of arg-maxima that are right, in one piece or through the state in chunks."""

import pytest
import torch

from statespan.evaluation import TaskBatch, answer_accuracy, phonebook
from statespan.layers.config import AttentionConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=16,
    layers=(LayerSpec("mamba1"), LayerSpec("attention")),
    attention=AttentionConfig(num_heads=2),
)


@pytest.mark.parametrize("chunk_length", [1, 7, 35, 2048])
def test_accuracy_is_that_of_the_logits(chunk_length: int) -> None:
    """Labels are made from the model's own arg-maxima, some of them spoilt: the shares are known."""
    model = build(CONFIG, seed=1)
    batch = phonebook(0, 8, num_entries=3)
    with torch.no_grad():
        logits = model(batch.input_ids).logits
    assert logits is not None
    asked = batch.labels >= 0
    labels = torch.where(asked, torch.cat([batch.labels[:, :1], logits[:, :-1].argmax(-1)], dim=1), batch.labels)
    first = asked.int().argmax(dim=1)
    for row in range(3):  # one digit of three rows
        labels[row, first[row]] = (labels[row, first[row]] + 1) % 128
    labels[0, first[0] + 2] += 1  # and another of the first
    found = answer_accuracy(model, TaskBatch(batch.input_ids, labels, batch.num_asked), chunk_length=chunk_length)
    assert found.tokens == pytest.approx((8 * 4 - 4) / (8 * 4))
    assert found.rows == pytest.approx(5 / 8)


def test_the_model_stays_in_its_mode() -> None:
    model = build(CONFIG)
    for mode in (True, False):
        model.train(mode)
        answer_accuracy(model, phonebook(0, 2, num_entries=2))
        assert model.training is mode
