"""linear_cross_entropy against float64 cross entropy of the full logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops import linear_cross_entropy
from statespan.ops.linear_cross_entropy import chunked
from statespan.ops.linear_cross_entropy.chunked import Problem

BACKENDS = ["torch", "reference"]


def problem(
    tokens: int = 37, hidden: int = 12, vocab: int = 50, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    labels = torch.randint(0, vocab - 6, (tokens,))
    labels[::5] = -100
    return (
        torch.randn(tokens, hidden, dtype=dtype, requires_grad=True),
        torch.randn(vocab, hidden, dtype=dtype, requires_grad=True),
        labels,
    )


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, vocab: int) -> Tensor:
    return F.cross_entropy((hidden @ weight.T)[:, :vocab], labels, reduction=reduction)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGITS_BYTES", 8 * 50 * 7)  # seven tokens a slice


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [50, 44])
def test_value_and_gradients(backend: str, reduction: str, vocab: int) -> None:
    hidden, weight, labels = problem()
    factor = torch.randn(37, dtype=torch.float64) if reduction == "none" else torch.tensor(-1.7, dtype=torch.float64)
    expected = truth(hidden, weight, labels, reduction, vocab)
    actual = linear_cross_entropy(hidden, weight, labels, reduction=reduction, valid_vocab_size=vocab, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad((actual * factor).sum(), (hidden, weight)),
        torch.autograd.grad((expected * factor).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        again = linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, valid_vocab_size=vocab, backend=backend
        )
    torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_batches_of_tokens_and_another_ignored_label() -> None:
    hidden, weight, _ = problem(24)
    labels = torch.randint(0, 50, (2, 3, 4))
    labels[0, 1] = 9
    actual = linear_cross_entropy(hidden.view(2, 3, 4, 12), weight, labels, ignore_index=9)
    expected = F.cross_entropy(hidden @ weight.T, labels.flatten(), ignore_index=9)
    torch.testing.assert_close(actual, expected)


def test_no_label_counts() -> None:
    hidden, weight, labels = problem()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss == 0
    assert torch.autograd.grad(loss, weight)[0].abs().max() == 0


def test_bfloat16_error_is_that_of_plain_pytorch() -> None:
    hidden, weight, labels = problem(200, 64, 50)
    exact = torch.autograd.grad(truth(hidden, weight, labels, "mean", 50), (hidden, weight))
    half = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    plain = torch.autograd.grad(F.cross_entropy((half[0] @ half[1].T).float(), labels), half)
    ours = torch.autograd.grad(linear_cross_entropy(*half, labels), half)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert o.dtype == torch.bfloat16
        assert (o.double() - e).norm() <= 1.2 * (p.double() - e).norm()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients() -> None:
    hidden, weight, labels = (t.detach() for t in problem(dtype=torch.float32))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    half = linear_cross_entropy(hidden.bfloat16(), weight.detach().bfloat16(), labels)
    torch.testing.assert_close(loss, half)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made inside stays below the slice's logits; the full logits would be 40 times that."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(chunked, "LOGITS_BYTES", 4 * 3000 * 10)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    hidden, weight = torch.randn(400, 4), torch.randn(3000, 4)
    with Watch():
        inputs = Problem(hidden, weight, torch.randint(0, 3000, (400,)), -100, 3000)
        chunked.losses_and_gradients(inputs, None)
    assert 3000 * 10 in sizes
    assert max(sizes) <= 3000 * 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck_and_compile(backend: str, reduction: str) -> None:
    hidden, weight, labels = problem(dtype=torch.float32)
    if reduction == "none":
        torch.library.opcheck(
            torch.ops.statespan.linear_cross_entropy_each.default, (hidden, weight, labels, -100, 44, backend)
        )
    else:
        torch.library.opcheck(
            torch.ops.statespan.linear_cross_entropy.default, (hidden, weight, labels, -100, 44, backend, True)
        )

    def run(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, labels, reduction=reduction, backend=backend).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), run(hidden, weight))
    for a, e in zip(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(run(hidden, weight), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((37,), 50)}, "label 50 is out of range; the vocabulary is 0 to 49"),
        ({"labels": torch.full((37,), -1)}, "label -1 is out of range"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, r"hidden must be \[.. h\] = \[36, 12\], got \[37, 12\]"),
        ({"valid_vocab_size": 51}, "valid_vocab_size 51 must be 1 to 50"),
        ({"reduction": "men"}, "did you mean 'mean'"),
        ({"backend": "torc"}, "did you mean 'torch'"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, object], message: str) -> None:
    hidden, weight, labels = problem()
    with pytest.raises(UserError, match=message) as caught:
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "labels": labels} | change))
    assert "\n" not in str(caught.value)
