"""Sampling against a plain computation of its own: sorted lists of Python floats, one row at a time."""

import math
from collections.abc import Collection

import pytest
import torch

from statespan.errors import UserError
from statespan.generation.penalties import History, penalize
from statespan.generation.sampling import (
    NonFiniteLogits,
    Sampling,
    draw,
    log_probabilities,
    sample,
    weights,
)


def plain_distribution(logits: list[float], sampling: Sampling, seen: Collection[int] = ()) -> list[float]:
    """The probabilities after penalty, temperature, top-k, top-p and min-p, from their definitions."""
    scores = []
    for token, logit in enumerate(logits):
        if token in seen:
            penalty = sampling.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        scores.append(logit / sampling.temperature)
    kept = sorted(range(len(scores)), key=lambda token: -scores[token])
    if sampling.top_k is not None:
        kept = kept[: sampling.top_k]

    def probabilities() -> dict[int, float]:
        top = max(scores[token] for token in kept)
        weights = {token: math.exp(scores[token] - top) for token in kept}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    if sampling.top_p is not None:
        nucleus, mass = [], 0.0
        for token, probability in probabilities().items():
            nucleus.append(token)
            mass += probability
            if mass >= sampling.top_p:
                break
        kept = nucleus
    if sampling.min_p is not None:
        table = probabilities()
        kept = [token for token in kept if table[token] >= sampling.min_p * max(table.values())]
    table = probabilities()
    return [table.get(token, 0.0) for token in range(len(scores))]


SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=3.0),
    Sampling(top_k=5),
    Sampling(top_k=1000),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9, temperature=2.0),
    Sampling(top_p=1e-6),
    Sampling(top_p=1.0),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.1),
    Sampling(temperature=0.9, top_k=3, top_p=0.99),
]


@pytest.mark.parametrize("vocab_size", [7, 50, 1500])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_equal_their_definitions(sampling: Sampling, vocab_size: int) -> None:
    logits = torch.randn(4, vocab_size) * 2
    ours = weights(logits, sampling)
    assert torch.equal(ours.amax(dim=-1), torch.ones(4))
    ours = ours / ours.sum(dim=-1, keepdim=True)
    for row in range(4):
        plain = torch.tensor(plain_distribution(logits[row].tolist(), sampling))
        torch.testing.assert_close(ours[row], plain, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours[row] > 0, plain > 0)


def test_the_nucleus_of_a_large_vocabulary() -> None:
    logits = torch.randn(3, 4000) * torch.tensor([[1e-3], [1.0], [8.0]])
    ours = weights(logits, Sampling(top_p=0.95))
    ours = ours / ours.sum(dim=-1, keepdim=True)
    for row in range(3):
        plain = torch.tensor(plain_distribution(logits[row].tolist(), Sampling(top_p=0.95)))
        # Thousands of float32 steps apart from the sum in float64, the edge may move by a token.
        assert abs(int((ours[row] > 0).sum()) - int((plain > 0).sum())) <= 2
        torch.testing.assert_close(ours[row], plain, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.6, top_k=6), Sampling(top_p=0.7), Sampling(min_p=0.3, repetition_penalty=1.7)],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    count, logits = 20_000, torch.randn(12) * 1.5
    seen = torch.zeros(1, 12, dtype=torch.bool)
    seen[0, [2, 3, 5]] = True
    generator = torch.Generator().manual_seed(3)
    ids = sample(logits.expand(count, -1), sampling, [generator] * count, History(seen, torch.zeros(1, 12)))
    share = torch.bincount(ids, minlength=12) / count
    plain = torch.tensor(plain_distribution(logits.tolist(), sampling, {2, 3, 5}))
    assert torch.all(share[plain == 0] == 0)
    deviation = (plain * (1 - plain) / count).sqrt()
    assert torch.all((share - plain).abs() <= 4.5 * deviation + 1e-9)


def test_neighbouring_seeds_draw_independently() -> None:
    """Samples of one prompt have seeds that count up: their first draws must be spread like any others."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    ids = draw(torch.ones(4000, 16), generators)
    share = torch.bincount(ids, minlength=16)
    chi_squared = ((share - 250.0) ** 2 / 250).sum()
    assert chi_squared < 40  # 15 degrees of freedom: exceeded once in 2,000 times
    pairs = torch.bincount(ids[:-1] * 16 + ids[1:], minlength=256)
    assert ((pairs - 3999 / 256) ** 2 / (3999 / 256)).sum() < 340


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, sampling = torch.randn(6, 900) * 3, Sampling(temperature=1.3, top_k=300, top_p=0.95, min_p=0.01)

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(6)]

    together, alone = generators(), generators()
    for _ in range(5):
        ids = sample(logits, sampling, together)
        single = [sample(logits[row : row + 1], sampling, [alone[row]]) for row in range(6)]
        assert torch.equal(ids, torch.cat(single))


@pytest.mark.parametrize(("number", "expected"), [(0.0, 3), (1 - 2**-53, 5)])
def test_a_token_of_probability_zero_is_never_drawn(
    number: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both ends of what torch.rand gives."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([number], dtype=torch.float64))
    values = torch.zeros(1, 9)
    values[0, [3, 5]] = torch.tensor([0.4, 1.0])
    assert draw(values, [torch.Generator()]).tolist() == [expected]


def test_greedy_takes_the_best_and_no_random_number() -> None:
    logits, generator = torch.randn(3, 40), torch.Generator().manual_seed(1)
    before = generator.get_state()
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, top_p=0.3, min_p=0.2), Sampling(top_k=1)):
        assert torch.equal(sample(logits, sampling, [generator] * 3), logits.argmax(dim=-1))
    assert torch.equal(generator.get_state(), before)


def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4, 3.0]])
    assert sample(logits, Sampling(temperature=1e-30), [torch.Generator()]).tolist() == [0]


def test_repetition_penalty_moves_seen_tokens_down_whatever_their_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize(logits, History(seen, torch.zeros(1, 4)), repetition=2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_tied_tokens_stay_together() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    kept = weights(logits, Sampling(top_k=2))
    assert (kept > 0).tolist() == [[True, True, True, False]]


def test_log_probabilities_sum_to_one_and_ignore_nothing() -> None:
    logits = torch.randn(5, 333).double()
    torch.testing.assert_close(log_probabilities(logits).exp().sum(dim=-1), torch.ones(5))
    expected = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    torch.testing.assert_close(log_probabilities(logits), expected.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0)], ids=str)
def test_bad_logits_name_the_row(bad: float, sampling: Sampling) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(NonFiniteLogits, match=f"row 1 .* it is {bad}") as caught:
        sample(logits, sampling, [torch.Generator()] * 3)
    assert caught.value.row == 1
    with pytest.raises(NonFiniteLogits, match="row 0"):
        sample(torch.full((1, 5), -math.inf), sampling, [torch.Generator()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} must be"):
        Sampling(**{name: value})  # type: ignore[arg-type]
