"""Penalties against a loop over the text that is recomputed from scratch for every token."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from statespan.errors import UserError
from statespan.generation.generate import generate
from statespan.generation.penalties import History, penalize
from statespan.generation.sampling import Sampling
from statespan.models.language_model import LanguageModel


def naive(logits: Sequence[float], sampling: Sampling, prompt: Sequence[int], reply: Sequence[int]) -> list[float]:
    """One row, one logit at a time, from the API's description."""
    scores: list[float] = []
    counts = Counter(reply)
    for token, logit in enumerate(logits):
        score = logit
        if token in prompt or token in reply:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        score -= counts[token] * sampling.frequency_penalty
        score -= (1 if counts[token] > 0 else 0) * sampling.presence_penalty
        scores.append(score)
    return scores


WAYS = [
    Sampling(temperature=0, frequency_penalty=0.5),
    Sampling(temperature=0, presence_penalty=1.5),
    Sampling(temperature=0, frequency_penalty=-0.3, presence_penalty=0.7, repetition_penalty=1.8),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["mamba1", "jamba"])
def test_greedy_text_is_that_of_a_naive_loop(tiny: Callable[[str], LanguageModel], kind: str, way: Sampling) -> None:
    model, prompt = tiny(kind), [5, 9, 5, 33]
    reply: list[int] = []
    for _ in range(24):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0, -1].tolist()
        scores = naive(logits, way, prompt, reply)
        reply.append(scores.index(max(scores)))
    options = {name: getattr(way, name) for name in ("frequency_penalty", "presence_penalty", "repetition_penalty")}
    results = generate(model, [prompt, [1, 2]], max_new_tokens=24, temperature=0, ignore_eos=True, **options)
    assert list(results[0].token_ids) == reply
    assert reply != list(generate(model, prompt, max_new_tokens=24, temperature=0, ignore_eos=True).token_ids)


def test_rows_with_drafts_count_them_place_by_place() -> None:
    generator = torch.Generator().manual_seed(1)
    prompts, replies, drafts = [[1, 2], [3]], [[2, 2, 5], [1]], [[5, 5, 0], []]
    sampling = Sampling(frequency_penalty=0.4, presence_penalty=-0.9, repetition_penalty=1.3)
    history = History.empty((2, 9), "cpu")
    history.begin(prompts)
    for row, reply in enumerate(replies):
        for token in reply:
            history.add_token(row, token)
    logits = torch.randn(5, 9, generator=generator)
    found = sampling.penalize(logits, history.at_places(drafts))
    texts = [(0, replies[0] + drafts[0][:count]) for count in range(4)] + [(1, replies[1])]
    for place, (row, reply) in enumerate(texts):
        want = naive(logits[place].tolist(), sampling, prompts[row], reply)
        assert found[place].tolist() == pytest.approx(want, abs=1e-6)
    assert torch.equal(history.counts.sum(1), torch.tensor([3.0, 1.0]))  # the drafts are not said yet


def test_tokens_of_all_rows_at_once_are_those_one_by_one() -> None:
    ours, theirs = History.empty((3, 7), "cpu"), History.empty((3, 7), "cpu")
    for ids in ([1, 2, 3], [1, 6, 3], [1, 1, 1]):
        ours.add(torch.tensor(ids))
        for row, token in enumerate(ids):
            theirs.add_token(row, token)
    assert torch.equal(ours.seen, theirs.seen) and torch.equal(ours.counts, theirs.counts)


def test_each_row_may_have_its_own() -> None:
    history, logits = History.empty((2, 4), "cpu"), torch.tensor([[2.0, -2.0, 1.0, 0.5]] * 2)
    history.begin([[0, 1], [1]])
    history.add(torch.tensor([1, 1]))
    both = penalize(
        logits,
        history,
        repetition=torch.tensor([[2.0], [1.0]]),
        frequency=torch.tensor([[0.0], [0.5]]),
        presence=torch.tensor([[1.0], [0.25]]),
    )
    assert both.tolist() == [[1.0, -5.0, 1.0, 0.5], [2.0, -2.75, 1.0, 0.5]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_penalties_are_finite(value: float) -> None:
    with pytest.raises(UserError, match="frequency_penalty must be finite"):
        Sampling(frequency_penalty=value)
