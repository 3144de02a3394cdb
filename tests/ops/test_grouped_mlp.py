"""grouped_mlp against every expert on every token, weighted, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.errors import UserError
from statespan.ops import grouped_mlp, quantize_rows

GPU = ["triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
BACKENDS = ["torch", "reference"]
GATED = {"swiglu": F.silu, "geglu": F.gelu}
ACTIVATIONS = [*GATED, "gelu", "relu", "silu"]
NAMES = ("x", "expert_weight", "up_proj", "down_proj", "up_bias", "down_bias")


def problem(
    tokens: int = 23,
    choices: int = 2,
    *,
    activation: str = "swiglu",
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (5, 6, 4),
) -> dict[str, Any]:
    """Arguments of grouped_mlp; floats require gradients. Nobody chooses expert 3, some choices are dropped."""
    experts, hidden, inner = sizes
    up = 2 * inner if activation in GATED else inner

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    index = torch.randint(-1, experts, (tokens, choices))
    index[index == 3] = 4
    if tokens > 2:
        index[1], index[2] = -1, 0  # a token without experts, a token that chose one expert again and again
    return {
        "x": normal(tokens, hidden),
        "expert_index": index,
        "expert_weight": normal(tokens, choices),
        "up_proj": normal(experts, up, hidden),
        "down_proj": normal(experts, hidden, inner),
        "up_bias": normal(experts, up) if bias else None,
        "down_bias": normal(experts, hidden) if bias else None,
        "activation": activation,
    }


def leaves(p: dict[str, Any]) -> list[Tensor]:
    return [p[name] for name in NAMES if p[name] is not None]


def dense(p: dict[str, Any]) -> Tensor:
    """All experts on all tokens; a token's weight for an expert is the sum over its choices of it."""
    inner = torch.einsum("th,efh->tef", p["x"], p["up_proj"])
    if p["up_bias"] is not None:
        inner = inner + p["up_bias"]
    if p["activation"] in GATED:
        half = inner.shape[-1] // 2
        inner = GATED[p["activation"]](inner[..., :half]) * inner[..., half:]
    else:
        inner = getattr(F, p["activation"])(inner)
    out = torch.einsum("tef,ehf->teh", inner, p["down_proj"])
    if p["down_bias"] is not None:
        out = out + p["down_bias"]
    chosen = (p["expert_index"][..., None] == torch.arange(out.shape[1])).to(out.dtype)  # [t k e]
    return torch.einsum("tke,tk,teh->th", chosen, p["expert_weight"], out)


def compare(p: dict[str, Any], **options: Any) -> None:
    actual, expected = grouped_mlp(**p, **options), dense(p)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, leaves(p), weight) for y in (actual, expected))
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_every_gradient(activation: str, bias: bool, backend: str) -> None:
    compare(problem(activation=activation, bias=bias), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "choices"), [(1, 1), (1, 3), (2, 5), (257, 1), (0, 2)])
def test_any_number_of_tokens_and_choices(tokens: int, choices: int, backend: str) -> None:
    compare(problem(tokens, choices), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_for_all_and_none_at_all(backend: str) -> None:
    p = problem(sizes=(1, 6, 4)) | {"expert_index": torch.zeros(23, 2, dtype=torch.int64)}
    compare(p, backend=backend)
    p["expert_index"].fill_(-1)
    compare(p, backend=backend)
    assert grouped_mlp(**p, backend=backend).abs().max() == 0


def test_weights_of_experts_that_nobody_chose_are_not_touched() -> None:
    p = problem(1, 2)
    p["expert_index"] = torch.tensor([[4, 1]])
    with torch.no_grad():
        expected = dense(p)
        for name in ("up_proj", "down_proj", "up_bias", "down_bias"):
            p[name][[0, 2, 3]] = float("nan")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(grouped_mlp(**p), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_without_gradients(tokens: int, activation: str, bias: bool) -> None:
    """Nothing is kept, and a single token takes a shorter way."""
    p = problem(tokens, 3, activation=activation, bias=bias)
    p["expert_index"][0, 1] = -1
    with torch.inference_mode():
        torch.testing.assert_close(grouped_mlp(**p), dense(p), rtol=1e-11, atol=1e-11)
        p["expert_index"][0, 2] = 7
        with pytest.raises(UserError, match="expert 7 is out of range; there are 0 to 4"):
            grouped_mlp(**p)


def test_strided_inputs_and_expanded_gradients() -> None:
    p = problem()
    strided = p | {name: torch.stack([p[name], p[name]], dim=-1)[..., 0] for name in (*NAMES, "expert_index")}
    assert not strided["x"].is_contiguous()
    found, wanted = (torch.autograd.grad(f.sum(), leaves(p)) for f in (grouped_mlp(**strided), dense(p)))
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


def test_gradients_only_where_they_are_wanted() -> None:
    p = problem()
    frozen = {name: value.detach() if isinstance(value, Tensor) else value for name, value in p.items()}
    y = grouped_mlp(**frozen | {"x": p["x"]})
    torch.testing.assert_close(torch.autograd.grad(y.sum(), p["x"])[0], torch.autograd.grad(dense(p).sum(), p["x"])[0])
    assert not grouped_mlp(**frozen).requires_grad


@pytest.mark.parametrize("backend", ["torch", *GPU])
def test_twice_the_same_to_the_bit(backend: str) -> None:
    p = problem(300, 2, dtype=torch.float32, sizes=(8, 32, 16))
    first, second = (grouped_mlp(**p, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves(p)) for y in (first, second)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", *GPU])
@pytest.mark.parametrize(
    ("tokens", "choices", "activation", "sizes"),
    [
        (7, 2, "swiglu", (5, 64, 48)),
        (200, 2, "swiglu", (5, 64, 48)),
        (1000, 2, "swiglu", (5, 64, 48)),
        (1000, 1, "gelu", (5, 208, 144)),
        (700, 3, "geglu", (5, 144, 208)),
    ],
)
def test_bfloat16_error_is_that_of_plain_pytorch(
    tokens: int, choices: int, activation: str, sizes: tuple[int, int, int], backend: str
) -> None:
    p = problem(tokens, choices, activation=activation, sizes=sizes)
    half = p | {
        name: p[name].detach().to(torch.float32 if name == "expert_weight" else torch.bfloat16).requires_grad_()
        for name in NAMES
    }
    exact_inputs = half | {name: half[name].detach().double().requires_grad_() for name in NAMES}
    plain_inputs = half | {"expert_weight": half["expert_weight"].detach().bfloat16().requires_grad_()}
    results = []
    for inputs, function in (
        (exact_inputs, dense),
        (half, lambda p: grouped_mlp(**p, backend=backend)),
        (plain_inputs, dense),
    ):
        y = function(inputs)
        torch.manual_seed(1)
        weight = torch.randn(y.shape).bfloat16().to(y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves(inputs), weight)])
    for name, exact, ours, plain in zip(("y", *NAMES), *results, strict=True):
        assert ours.dtype == half["x" if name == "y" else name].dtype
        error, yardstick = ((value.double() - exact).norm() for value in (ours, plain))
        assert error <= 1.2 * yardstick, f"{name}: {error:.2e} against {yardstick:.2e}"


def exact(p: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64."""
    return p | {name: p[name].detach().double().requires_grad_() for name in NAMES if p[name] is not None}


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize(
    ("activation", "bias", "tokens", "choices", "sizes"),
    [(activation, True, 40, 2, (5, 6, 4)) for activation in ACTIVATIONS]  # each pays for compilation
    + [
        ("swiglu", False, 1, 2, (5, 6, 4)),
        ("silu", False, 3, 1, (8, 64, 48)),
        ("gelu", False, 40, 3, (64, 64, 80)),
        ("swiglu", True, 700, 2, (5, 96, 64)),
    ],
)
def test_float32_on_a_gpu(
    activation: str, bias: bool, tokens: int, choices: int, sizes: tuple[int, int, int], backend: str
) -> None:
    p = problem(tokens, choices, activation=activation, bias=bias, dtype=torch.float32, sizes=sizes)
    q = exact(p)
    y, truth = grouped_mlp(**p, backend=backend), dense(q)
    with torch.no_grad():
        pairs = [(y, truth), (grouped_mlp(**p, backend=backend), truth)]
    weight = torch.randn_like(truth)
    found, wanted = torch.autograd.grad(y, leaves(p), weight.float()), torch.autograd.grad(truth, leaves(q), weight)
    for a, e in (*pairs, *zip(found, wanted, strict=True)):
        assert (a - e).abs().max() <= 4e-6 * e.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("tokens", "choices", "hidden", "dtype"),
    [(23, 2, 16, torch.float32), (900, 1, 16, torch.bfloat16), (60, 1, 448, torch.float32)],
)
def test_an_index_that_names_no_expert_is_nan_on_a_gpu(
    tokens: int, choices: int, hidden: int, dtype: torch.dtype, keep: bool, backend: str
) -> None:
    p = problem(tokens, choices, dtype=dtype, sizes=(5, hidden, 32))
    truth = dense(exact(p))
    p["expert_index"] = p["expert_index"].clone()
    p["expert_index"][[4, 7], [0, choices - 1]] = torch.tensor([5, -2])
    with torch.set_grad_enabled(keep):
        y = grouped_mlp(**p, backend=backend)
    assert y[[4, 7]].isnan().all()
    others = [token for token in range(tokens) if token not in (4, 7)]
    assert (y - truth)[others].norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * truth.norm()
    assert (y[1] == 0).all()  # whose choices were dropped


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_one_graph_for_every_routing(tokens: int, backend: str) -> None:
    p = problem(tokens, dtype=torch.float32)
    with torch.no_grad():
        grouped_mlp(**p, backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = grouped_mlp(**p, backend=backend)
        for _ in range(3):
            p["expert_index"].copy_(torch.randint(-1, 5, (tokens, 2)))
            y.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(y, dense(p), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*GPU, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (1, (5, 6, 4)),
        (7, (5, 64, 48)),
        (60, (5, 64, 48)),
        (600, (5, 64, 48)),
        (1500, (5, 64, 48)),
        (300, (5, 4096, 48)),
    ],
)
def test_int8_weights(tokens: int, sizes: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    p = problem(tokens, sizes=sizes, dtype=dtype)
    p |= {name: p[name].detach() for name in NAMES}
    widened = exact(p)
    for name in ("up_proj", "down_proj"):
        quantized, scales = zip(*(quantize_rows(matrix) for matrix in p[name]), strict=True)
        p[name], p[name.replace("proj", "scale")] = torch.stack(quantized), torch.stack(scales)
        widened[name] = p[name].double() * torch.stack(scales)[..., None]
    with torch.no_grad():
        y, truth = grouped_mlp(**p, backend=backend), dense(widened)
    limit = 4e-6 if dtype == torch.float32 else 2**-6
    assert (y - truth).abs().max() <= limit * truth.abs().max()


def test_autocast_casts_all_but_the_choices_weights() -> None:
    p = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_mlp(**p)
    found = torch.autograd.grad(y.float().sum(), leaves(p))
    half = p | {name: p[name].detach().bfloat16().requires_grad_() for name in NAMES if name != "expert_weight"}
    expected = grouped_mlp(**half)
    assert torch.equal(y, expected)
    for a, e, leaf in zip(found, torch.autograd.grad(expected.float().sum(), leaves(half)), leaves(p), strict=True):
        assert a.dtype == leaf.dtype == torch.float32
        assert torch.equal(a, e.float())


def test_backward_keeps_inputs_and_inner_rows() -> None:
    p = problem()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        grouped_mlp(**p)
    inputs = {value.data_ptr() for value in p.values() if isinstance(value, Tensor)}
    others = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in inputs]
    assert others == [(23 * 2, 2 * 4)]


@pytest.mark.parametrize("backend", [*GPU, *BACKENDS])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias: bool, backend: str) -> None:
    p = problem(7, bias=bias, dtype=torch.float32)
    p["expert_index"] = p["expert_index"].clamp(min=0)  # what is kept of a dropped choice is anything
    keep = backend != "reference"
    torch.library.opcheck(torch.ops.statespan.grouped_mlp.default, (*p.values(), keep, backend))


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_without_a_graph_break(grad: bool) -> None:
    p = problem()

    def run(*tensors: Tensor) -> Tensor:
        return grouped_mlp(**p | dict(zip(NAMES, tensors, strict=True)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        actual, expected = compiled(*leaves(p)), run(*leaves(p))
    assert torch.equal(actual, expected)
    if grad:
        found, wanted = (torch.autograd.grad(y.sin().sum(), leaves(p)) for y in (actual, expected))
        for a, e in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 3, 6)}, r"x must be \[t h\], got \[2, 3, 6\]"),
        ({"expert_index": torch.full((23, 2), 5)}, "expert 5 is out of range; there are 0 to 4, and -1 for none"),
        ({"expert_index": torch.full((23, 2), -2)}, "expert -2 is out of range"),
        ({"expert_index": torch.zeros(22, 2, dtype=torch.int64)}, r"expert_index must be \[t k\] = \[23, 2\]"),
        ({"expert_weight": torch.randn(23, 1)}, r"expert_weight must be \[t k\] = \[23, 2\], got \[23, 1\]"),
        ({"up_proj": torch.randn(5, 4, 6)}, r"up_proj must be \[e 2f h\] = \[5, 8, 6\], got \[5, 4, 6\]"),
        ({"activation": "silu"}, r"up_proj must be \[e f h\] = \[5, 4, 6\], got \[5, 8, 6\]"),
        ({"down_proj": torch.randn(5, 7, 4)}, r"down_proj must be \[e h f\] = \[5, 6, 4\], got \[5, 7, 4\]"),
        ({"up_bias": torch.randn(5, 4)}, r"up_bias must be \[e 2f\] = \[5, 8\], got \[5, 4\]"),
        ({"down_bias": torch.randn(6)}, r"down_bias must be \[e h\] = \[5, 6\], got \[6\]"),
        ({"x": torch.randn(23, 6).bfloat16()}, "x is torch.bfloat16 and up_proj torch.float32; they must agree"),
        ({"activation": "swigul"}, "did you mean 'swiglu'"),
        ({"backend": "torhc"}, "did you mean 'torch'"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        grouped_mlp(**problem(dtype=torch.float32) | change)
    assert "\n" not in str(caught.value)
