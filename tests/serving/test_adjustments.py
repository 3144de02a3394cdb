"""Biases, constraints and penalties of many rows at once, against each row alone."""

from dataclasses import replace

import pytest
import torch

from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.generation.options import GenerationOptions
from statespan.serving.adjustments import adjusted
from statespan.serving.constraint import Vocabulary
from statespan.serving.job import Job, Sample
from statespan.serving.request import Request

OPTIONS = [
    GenerationOptions(),
    GenerationOptions(frequency_penalty=0.7),
    GenerationOptions(presence_penalty=-1.1, repetition_penalty=1.4),
    GenerationOptions(),
    GenerationOptions(repetition_penalty=0.8, frequency_penalty=0.2, presence_penalty=0.3),
]


@pytest.fixture
def samples(hybrid):
    """Rows that are in the middle of a reply, of every kind."""
    found: list[Sample] = []
    for place, options in enumerate(OPTIONS):
        bias = {3: 2.5, 60: -40.0} if place in (2, 3) else {}
        sample = Sample(Job(Request((1, 2, 3), options, logit_bias=bias), 0, 0), 0, None, hybrid)
        for token in (3, 7, 7, place):
            sample.extend([])
            sample._push(token)
        found.append(sample)
    return found


def test_rows_together_are_rows_alone(samples):
    device = samples[1].history.seen.device
    logits = torch.randn(len(samples), 61, generator=torch.Generator().manual_seed(2)).to(device)
    before = logits.clone()
    together = adjusted(logits, samples)
    assert torch.equal(logits, before) and torch.equal(together[0], logits[0])
    for row, sample in enumerate(samples):
        assert torch.equal(together[row : row + 1], adjusted(logits[row : row + 1], [sample])), row
    # Row 4: 3 was in the prompt and said once, 7 said twice.
    want = {3: 0.2 + 0.3, 7: 2 * 0.2 + 0.3, 1: 0.0, 0: 0.0}
    for token, less in want.items():
        logit = float(logits[4, token])
        penalty = 1.0 if token == 0 else 0.8
        moved = logit / penalty if logit > 0 else logit * penalty
        assert float(together[4, token]) == pytest.approx(moved - less, abs=1e-6)
    assert float(together[3, 60]) == pytest.approx(float(logits[3, 60]) - 40, abs=1e-5)


def test_places_behind_drafts_are_as_if_the_drafts_were_said(samples):
    drafts = [[5], [7, 7, 2], [], [1, 1], [4]]
    count = sum(len(ids) + 1 for ids in drafts)
    logits = torch.randn(count, 61, generator=torch.Generator().manual_seed(3))
    logits = logits.to(samples[1].history.seen.device)
    together, start = adjusted(logits, samples, drafts), 0
    for sample, ids in zip(samples, drafts, strict=True):
        for token in (*ids, None):
            row = slice(start, start + 1)
            torch.testing.assert_close(together[row], adjusted(logits[row], [sample]), rtol=0, atol=1e-6)
            start += 1
            if token is not None:
                sample._push(token)


def test_a_constraint_and_a_bias_meet(hybrid):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    constraint = Vocabulary(ByteTokenizer(), 256).regex("[ab]")
    options = GenerationOptions(frequency_penalty=1.0)
    request = replace(Request((97,), options, constraint=constraint), logit_bias={97: 3.0})
    config = hybrid.config.replace(vocab_size=256)
    model = type("Model", (), {"device": torch.device("cpu"), "config": config})()
    found = adjusted(torch.zeros(1, 256), [Sample(Job(request, 0, 0), 0, None, model)])
    assert found[0, 97] == 3.0 and found[0, 98] == 0.0
    assert found[0].isfinite().sum() == 2
