"""Where sampling cuts off: the kept tokens against sorted lists of Python floats, which nothing rounds."""

import math

import pytest
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops import sampling_edge

GPU = ["cuda"] if torch.cuda.is_available() else []
BACKENDS = [*GPU, "torch", "reference"]


def random_weights(rows: int, vocab_size: int, spread: float) -> Tensor:
    """With rows of equal weights, of ties and of tokens without a chance."""
    logits = spread * torch.randn(rows, vocab_size)
    logits[0] = 0
    logits[1, : vocab_size // 2] = -math.inf
    logits[2, ::3] = logits[2, 0].item()
    return (logits - logits.amax(dim=1, keepdim=True)).exp()


def kept_by_definition(weights: list[float], top_k: int | None, top_p: float | None) -> list[bool]:
    """The k largest and what ties with the last one, of these the fewest that hold top_p of their sum."""
    best = sorted(weights, reverse=True)
    if top_k is not None and top_k < len(best):
        best = [weight for weight in best if weight >= best[top_k - 1]]
    if top_p is not None and top_p < 1:
        wanted = top_p * math.fsum(best)
        best = best[: next(n for n in range(1, len(best) + 1) if math.fsum(best[:n]) >= wanted)]
    return [weight >= best[-1] for weight in weights]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("vocab_size", [1, 7, 501])
def test_what_is_kept_is_what_the_definition_keeps(vocab_size: int, spread: float, backend: str) -> None:
    weights = random_weights(9, vocab_size, spread)
    top_k = torch.randint(1, vocab_size + 3, (9,))
    top_p = torch.tensor([0.4996, 0.9, 0.3, 1.0, 1e-6, 0.99, 0.5, 0.75, 0.12345])
    for k, p in ((top_k, None), (None, top_p), (top_k, top_p), (None, None)):
        edge = sampling_edge(weights, k, p, backend=backend)
        assert edge.shape == (9, 1) and edge.dtype == torch.float32
        ks, ps = ([None] * 9 if option is None else option.tolist() for option in (k, p))
        for row, values in enumerate(weights.tolist()):
            expected = kept_by_definition(values, ks[row], ps[row])
            assert (weights[row] >= edge[row]).tolist() == expected, (row, ks[row], ps[row])


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("vocab_size", [50280, 131072])
def test_large_vocabularies(vocab_size: int, backend: str) -> None:
    """The mass of what is kept reaches top_p, and without its least token does not."""
    weights = random_weights(16, vocab_size, 2.0)[:, torch.randperm(vocab_size)]
    top_k, top_p = torch.randint(1, vocab_size, (16,)), torch.rand(16).clamp(min=0.01)
    edge = sampling_edge(weights, top_k, backend=backend)
    more, enough = ((weights > edge).sum(1), (weights >= edge).sum(1))
    assert ((more < top_k) & (enough >= top_k)).all()
    edge = sampling_edge(weights, top_p=top_p, backend=backend)
    wide, wanted = weights.double(), top_p.double() * weights.double().sum(1)
    more, enough = ((wide * (weights > edge)).sum(1), (wide * (weights >= edge)).sum(1))
    assert ((more <= wanted * (1 + 1e-6)) & (enough >= wanted * (1 - 1e-6))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_number_for_all_rows_no_rows_and_strided_rows(backend: str) -> None:
    weights = torch.tensor([[0.1, 1.0, 0.5], [1.0, 0.1, 0.1]])
    assert sampling_edge(weights, top_p=0.9, backend=backend).tolist() == [[0.5], [0.10000000149011612]]
    assert sampling_edge(weights[:0], top_p=0.9, backend=backend).shape == (0, 1)
    apart = torch.stack([weights, weights + 7], dim=2)[..., 0]
    assert sampling_edge(apart, top_p=0.9, backend=backend).tolist() == [[0.5], [0.10000000149011612]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_nan_leaves_the_others_alone(backend: str) -> None:
    weights = random_weights(4, 20, 1.0)
    alone = sampling_edge(weights[1:], torch.full((3,), 5), torch.full((3,), 0.8), backend=backend)
    weights[0] = math.nan
    assert torch.equal(sampling_edge(weights, torch.full((4,), 5), torch.full((4,), 0.8), backend=backend)[1:], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    arguments = (torch.rand(3, 9), torch.tensor([2, 9, 4]), torch.tensor([0.5, 0.9, 1.0]), backend)
    torch.library.opcheck(torch.ops.statespan.sampling_edge.default, arguments)


def test_bad_arguments_are_told() -> None:
    weights = torch.rand(3, 9)
    with pytest.raises(UserError, match=r"weights must be float32, got torch\.float64"):
        sampling_edge(weights.double())
    with pytest.raises(UserError, match=r"top_k"):
        sampling_edge(weights, torch.ones(4, dtype=torch.int64))
    with pytest.raises(UserError, match=r"top_p"):
        sampling_edge(weights, top_p=torch.ones(2))
    with pytest.raises(UserError, match=r"weights"):
        sampling_edge(weights[0])
    with pytest.raises(UserError, match=r"top_k must be int64, got torch\.int32"):  # kernels take addresses
        sampling_edge(weights, torch.ones(3, dtype=torch.int32))
    with pytest.raises(UserError, match=r"top_p must be float32, got torch\.float64"):
        sampling_edge(weights, top_p=torch.ones(3, dtype=torch.float64))
