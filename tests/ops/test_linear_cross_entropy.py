"""linear_cross_entropy against PyTorch's cross entropy of the full logits in float64."""

import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statespan.errors import UserError
from statespan.ops.linear_cross_entropy import chunked, cpu, linear_cross_entropy

GPU = ["triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
BACKENDS = ["torch", "reference"]


@pytest.fixture
def seven_tokens_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 4 * 50 * 7)


def problem(
    tokens: int = 37, hidden: int = 12, vocab: int = 50, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, vocab - 6, (tokens,))
    labels[::5] = -100
    return (
        torch.randn(tokens, hidden, dtype=dtype, requires_grad=True),
        torch.randn(vocab, hidden, dtype=dtype, requires_grad=True),
        labels,
    )


@pytest.mark.usefixtures("seven_tokens_a_chunk")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("valid", [None, 44])
def test_values_and_gradients(backend: str, reduction: str, valid: int | None) -> None:
    hidden, weight, labels = problem()
    expected = F.cross_entropy((hidden @ weight.T)[:, :valid], labels, reduction=reduction)
    options = {"reduction": reduction, "valid_vocab_size": valid, "backend": backend}
    actual = linear_cross_entropy(hidden, weight, labels, **options)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, **options), actual)

    upstream = torch.randn_like(expected)
    for inputs in ((hidden, weight), (hidden,), (weight,)):
        h, w = (value if any(value is i for i in inputs) else value.detach() for value in (hidden, weight))
        actual = linear_cross_entropy(h, w, labels, **options)
        found = torch.autograd.grad(actual, inputs, upstream)
        wanted = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("seven_tokens_a_chunk")
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 63])
def test_any_number_of_tokens(tokens: int) -> None:
    hidden, weight, labels = problem(tokens)
    labels[0] = 3
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), F.cross_entropy(hidden @ weight.T, labels))


def test_batches_strided_rows_and_another_ignored_label() -> None:
    hidden, weight, _ = problem(24)
    labels = torch.randint(0, 50, (2, 12))
    labels[0, 3] = 9
    rows = hidden.view(2, 12, 12)
    actual = linear_cross_entropy(rows[:, :-1], weight, labels[:, 1:], ignore_index=9, reduction="none")
    logits = (rows[:, :-1] @ weight.T).transpose(1, 2)
    expected = F.cross_entropy(logits, labels[:, 1:], ignore_index=9, reduction="none")
    torch.testing.assert_close(actual, expected)
    found, wanted = (torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in (actual, expected))
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_label_counts(backend: str, tokens: int) -> None:
    hidden, weight, labels = problem(tokens)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), backend=backend)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert (gradient == 0).all()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = problem(dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e3, weight, labels)
    torch.testing.assert_close(loss, F.cross_entropy(hidden * 1e3 @ weight.T, labels))


@pytest.mark.usefixtures("seven_tokens_a_chunk")
def test_bfloat16_error_is_that_of_plain_pytorch() -> None:
    """Many chunks: their gradients must be added up in float32."""
    half = [value.detach().bfloat16().requires_grad_() for value in problem(300, 64)[:2]]
    labels = torch.randint(0, 50, (300,))
    wide = [value.detach().double().requires_grad_() for value in half]
    exact = F.cross_entropy(wide[0] @ wide[1].T, labels)
    ours, plain = linear_cross_entropy(*half, labels), F.cross_entropy((half[0] @ half[1].T).float(), labels)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 1.2 * (plain - exact).abs()
    pairs = [torch.autograd.grad(loss, inputs) for loss, inputs in ((exact, wide), (ours, half), (plain, half))]
    for e, a, p in zip(*pairs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - e).norm() <= 1.2 * (p.double() - e).norm()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients() -> None:
    hidden, weight, labels = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    half = [value.detach().bfloat16().requires_grad_() for value in (hidden, weight)]
    expected = linear_cross_entropy(*half, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    found, wanted = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, half)
    for a, e in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e.float())


@pytest.mark.parametrize("backend", ["torch", *(GPU or ["cpu"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("valid", [None, 5003])
def test_error_is_that_of_plain_pytorch(
    backend: str, dtype: torch.dtype, reduction: str, valid: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks and a vocabulary of odd size, by the error of plain PyTorch in the same dtype."""
    module = import_module("statespan.ops.linear_cross_entropy.triton_backend") if backend == "triton" else chunked
    monkeypatch.setattr(module, "LOGIT_BYTES", 5056 * 4 * 130)
    inputs = [value.to(dtype).detach().requires_grad_() for value in problem(700, 64, 5009)[:2]]
    labels = torch.randint(0, 5003, (700,))
    labels[::7] = -100
    options = {"reduction": reduction, "valid_vocab_size": valid}
    wide = [value.detach().double().requires_grad_() for value in inputs]
    losses = [
        linear_cross_entropy(*inputs, labels, backend=backend, **options),
        F.cross_entropy((inputs[0] @ inputs[1].T)[:, :valid].float(), labels, reduction=reduction),
        F.cross_entropy((wide[0] @ wide[1].T)[:, :valid], labels, reduction=reduction),
    ]
    assert losses[0].dtype == torch.float32
    upstream = torch.randn(losses[0].shape)
    found = [
        [loss, *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]
        for loss, leaves in zip(losses, (inputs, inputs, wide), strict=True)
    ]
    for ours, plain, exact in zip(*found, strict=True):
        floor = 2e-7 * exact.norm()
        assert (ours.double() - exact).norm() <= 1.3 * (plain.double() - exact).norm() + floor


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at once in storages that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.live:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_stays_far_below_the_full_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "LOGIT_BYTES", 64 << 20)  # a quarter of the default, for a test a quarter as large
    tokens, vocab = 4096, 50_000
    hidden, weight = torch.randn(tokens, 2), torch.randn(vocab, 2)
    labels = torch.randint(0, vocab, (tokens,))
    with LiveBytes() as memory:
        chunked.losses_and_gradients(hidden, weight, labels, -100, vocab, None, True, True)
    full = 4 * tokens * vocab
    assert chunked.LOGIT_BYTES / 2 < memory.peak < full / 5


@pytest.mark.usefixtures("seven_tokens_a_chunk")
def test_other_gradients_flow_on() -> None:
    """The head's gradient joins what else the weight does (a tied embedding), and a loss scale passes through."""
    hidden, weight, labels = problem()
    found, wanted = (
        torch.autograd.grad(3 * loss(hidden * weight[5], weight) + weight.square().sum(), (hidden, weight))
        for loss in (
            lambda h, w: linear_cross_entropy(h, w, labels),
            lambda h, w: F.cross_entropy(h @ w.T, labels),
        )
    )
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 32, 50])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_cpu_kernel_at_any_size(vocab: int, tokens: int) -> None:
    torch.manual_seed(vocab)
    logits, labels = 5 * torch.randn(tokens, vocab + 3), torch.randint(0, vocab, (tokens,))
    leaf, scale = logits[:, :vocab].double().requires_grad_(), torch.rand(tokens)
    expected = F.cross_entropy(leaf, labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected, leaf, scale.double())
    kept = logits.clone()
    for scales, factor in ((None, 1 / scale), (scale, torch.ones(tokens))):
        rows = kept.clone()
        found = cpu.losses_and_gradients(rows[:, :vocab], labels, scales, vocab, True)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rows[:, :vocab].double(), gradient * factor[:, None], rtol=1e-6, atol=1e-6)
        assert torch.equal(rows[:, vocab:], kept[:, vocab:])
    assert torch.equal(cpu.losses_and_gradients(kept[:, :vocab], labels, None, vocab, False), found)
    assert torch.equal(kept, logits)


def test_logits_that_are_not_finite_give_a_loss_that_is_not() -> None:
    for value in (float("nan"), float("inf")):
        logits = torch.randn(1, 40)
        logits[0, 7] = value
        assert not cpu.losses_and_gradients(logits, torch.tensor([3]), None, logits.shape[1], False).isfinite()


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("wrong", [-1, 47, 1 << 40])
def test_a_wrong_label_on_a_gpu_gives_nan_and_touches_no_other_token(backend: str, wrong: int) -> None:
    hidden, weight = torch.randn(9, 16), torch.randn(50, 16)
    labels = torch.randint(0, 47, (9,))
    right = linear_cross_entropy(hidden, weight, labels, reduction="none", valid_vocab_size=47, backend=backend)
    labels[4] = wrong
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", valid_vocab_size=47, backend=backend)
    assert losses[4].isnan()
    keep = torch.arange(9, device=losses.device) != 4
    assert torch.equal(losses[keep], right[keep])


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("valid", [50, 44])
def test_opcheck(backend: str, reduction: str, valid: int) -> None:
    hidden, weight, labels = problem(dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.statespan.linear_cross_entropy.default,
        (hidden, weight, labels, -100, reduction, valid, True, True, backend),
    )


@pytest.mark.usefixtures("seven_tokens_a_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype=dtype)

    def run(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(h.tanh(), w, labels, reduction=reduction).sin().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(hidden, weight, labels), run(hidden, weight, labels)
    torch.testing.assert_close(actual, expected)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (actual, expected))
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, labels), expected)
    with pytest.raises(UserError, match="label 50 is out of range"):
        compiled(hidden, weight, labels.masked_fill(labels == labels[1], 50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((37,), 50)}, "label 50 is out of range; the vocabulary is 0 to 49"),
        ({"labels": torch.full((37,), -1)}, "label -1 is out of range"),
        ({"labels": torch.full((37,), 46), "valid_vocab_size": 44}, "label 46 is out of range; .* 0 to 43"),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, r"labels must be \[..\] = \[37\], got \[36\]"),
        ({"weight": torch.randn(50, 11)}, r"hidden must be \[.. h\] = \[37, 11\], got \[37, 12\]"),
        ({"valid_vocab_size": 51}, "valid_vocab_size must be in 1 .. 50, the rows of weight; got 51"),
        ({"valid_vocab_size": 0}, "valid_vocab_size must be in 1 .. 50"),
        ({"reduction": "men"}, "did you mean 'mean'"),
        ({"backend": "torc"}, "did you mean 'torch'"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes_are_one_line(change: dict[str, Any], message: str, backend: str) -> None:
    hidden, weight, labels = problem(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "backend": backend} | change
    with pytest.raises(UserError, match=message) as caught:
        linear_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)
