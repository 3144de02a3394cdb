"""decode_attention against the softmax written out in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from statespan.errors import BackendUnavailable, UserError
from statespan.ops import decode_attention, paged_decode_attention

GPU = ["triton"] if torch.cuda.is_available() else []  # conftest.py makes their tests' tensors on the GPU
BACKENDS = [*GPU, "torch", "reference"]
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def problem(
    batch: int = 3,
    slots: int = 70,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments: rows padded on the left by 0, 5, 10 .. slots, keys and values strided, as after a projection."""
    both = torch.randn(batch, slots, 2 * kv_heads, head_dim, dtype=dtype)
    offset = 5 * torch.arange(batch)[:, None]
    position = (torch.arange(slots)[None] - offset).clamp(min=-1).to(torch.int32)
    return {
        "query": torch.randn(batch, heads, head_dim, dtype=dtype),
        "key": both[:, :, :kv_heads],
        "value": both[:, :, kv_heads:],
        "position": position,
        "next_position": position[:, -1] + 1,
    }


def truth(p: dict[str, Any]) -> Tensor:
    query, key, value = (p[name].double() for name in ("query", "key", "value"))
    used = key.shape[1] if p.get("length") is None else int(p["length"])
    heads_each = query.shape[1] // key.shape[2]
    scale = p.get("scale") or 1 / math.sqrt(query.shape[2])
    window = p.get("sliding_window") or 1 << 40
    y = torch.zeros_like(query)
    for b in range(query.shape[0]):
        newest = 1 << 30 if p.get("next_position") is None else int(p["next_position"][b])
        places = p["position"][b, :used].tolist()
        seen = [s for s, place in enumerate(places) if 0 <= place <= newest and newest - place < window]
        for h in range(query.shape[1] if seen else 0):
            weights = [math.exp(scale * float(query[b, h] @ key[b, s, h // heads_each])) for s in seen]
            for weight, s in zip(weights, seen, strict=True):
                y[b, h] += weight / sum(weights) * value[b, s, h // heads_each]
    return y


def compare(p: dict[str, Any], backend: str, limit: float = 3e-6) -> None:
    y, exact = decode_attention(**p, backend=backend), truth(p)
    assert y.dtype == p["query"].dtype
    assert (y - exact).abs().max() <= limit * exact.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("slots", "heads", "kv_heads", "head_dim"), [(1, 1, 1, 8), (63, 6, 2, 20), (257, 20, 1, 64)])
def test_values(slots: int, heads: int, kv_heads: int, head_dim: int, backend: str) -> None:
    compare(problem(2, slots, heads, kv_heads, head_dim), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 17, 64, 70])
def test_slots_behind_the_length_are_never_read(length: int, backend: str) -> None:
    p = problem()
    p["length"] = torch.tensor([length], dtype=torch.int32)
    p["key"][:, length:], p["value"][:, length:] = math.nan, math.nan
    p["position"][:, length:] = 3
    compare(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [1, 9, 1000])
def test_a_window_and_slots_in_any_order(window: int, backend: str) -> None:
    p = problem() | {"sliding_window": window, "scale": 0.7}
    p["position"] = torch.randint(-1, 70, (3, 70), dtype=torch.int32)
    p["next_position"] = torch.tensor([69, 40, 0], dtype=torch.int32)
    compare(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_nothing_is_zero(backend: str) -> None:
    p = problem()
    p["position"][1] = -1
    compare(p, backend)
    assert decode_attention(**p, backend=backend)[1].abs().max() == 0
    p["next_position"] = None
    compare(p, backend)
    p["length"] = torch.zeros(1, dtype=torch.int32)
    assert decode_attention(**p, backend=backend).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_slots(backend: str) -> None:
    assert decode_attention(**problem(0), backend=backend).shape == (0, 4, 16)
    p = problem(2)
    p |= {name: p[name][:, :0] for name in ("key", "value", "position")}
    assert decode_attention(**p, backend=backend).abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_any_size(backend: str) -> None:
    p = problem()
    p["query"] *= 1e3
    y, exact = decode_attention(**p, backend=backend), truth_by_softmax(p)
    assert (y - exact).abs().max() <= 1e-3 * exact.abs().max()  # scores of 1e4 have an error of 1e-3 in float32


def truth_by_softmax(p: dict[str, Any]) -> Tensor:
    key, value = (p[name].double().repeat_interleave(2, dim=2) for name in ("key", "value"))
    score = torch.einsum("bhp,bshp->bhs", p["query"].double(), key) / 4
    score = score.masked_fill(p["position"][:, None] < 0, -math.inf)
    return torch.einsum("bhs,bshp->bhp", score.softmax(-1), value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    compare(problem(2, 200, 8, 2, 32, dtype), backend, 2 * HALF[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_to_the_bit(backend: str) -> None:
    p = problem(2, 2000)
    assert torch.equal(decode_attention(**p, backend=backend), decode_attention(**p, backend=backend))


@pytest.mark.parametrize("backend", GPU)
def test_one_graph_for_every_length(backend: str) -> None:
    p = problem(2, 3000, 8, 2, 64)
    p["length"] = torch.ones(1, dtype=torch.int32)
    decode_attention(**p, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(**p, backend=backend)
    for length in (1, 64, 65, 1000, 3000):
        p["length"].fill_(length)
        y.fill_(math.nan)
        graph.replay()
        exact = decode_attention(**{k: v.cpu() for k, v in p.items()}, backend="reference")
        torch.testing.assert_close(y.cpu(), exact, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_pytorch() -> None:
    p = problem()
    for name in ("query", "key", "value"):
        p[name] = p[name].double().requires_grad_()
    found, wanted = (
        torch.autograd.grad(decode_attention(**p, backend=backend).sin().sum(), (p["query"], p["key"], p["value"]))
        for backend in ("auto", "reference")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UserError if GPU else BackendUnavailable), torch.set_grad_enabled(bool(GPU)):
        decode_attention(**p, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    p = problem()
    arguments = (p["query"], p["key"], p["value"], p["position"], None, p["next_position"], 9, 0.25, backend)
    torch.library.opcheck(torch.ops.statespan.decode_attention.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    p = problem()
    compiled = torch.compile(lambda query: decode_attention(**p | {"query": query}), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(p["query"]), decode_attention(**p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(3, 4)}, r"query must be \[b h p\], got \[3, 4\]"),
        ({"key": torch.randn(3, 70, 2, 8)}, r"key must be \[b s g p\] = \[3, 70, 2, 16\], got \[3, 70, 2, 8\]"),
        ({"value": torch.randn(3, 69, 2, 16)}, r"value must be \[b s g p\] = \[3, 70, 2, 16\], got \[3, 69, 2, 16\]"),
        ({"position": torch.zeros(70)}, r"position must be \[b s\] = \[3, 70\], got \[70\]"),
        ({"length": torch.zeros(3)}, r"length must be one number, \[\] or \[1\], got \[3\]"),
        ({"next_position": torch.zeros(2)}, r"next_position must be \[b\] = \[3\], got \[2\]"),
        ({"query": torch.randn(3, 5, 16)}, "the 2 kv heads must divide h = 5"),
        ({"query": torch.randn(3, 4, 16).bfloat16()}, "query is torch.bfloat16 and key torch.float32; they must agree"),
        ({"sliding_window": 3, "next_position": None}, "a sliding_window needs next_position"),
        ({"key": torch.empty(3, 70, 2, 16, device="meta")}, "query is on cpu, and key on meta"),
        ({"backend": "tirton"}, "did you mean 'triton'"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        decode_attention(**problem() | change)
    assert "\n" not in str(caught.value)


def paged(
    lengths: list[int],
    page_size: int,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
):
    """Arguments in which all that no row sees is NaN, what its window has left behind too."""
    most = -(-max(*lengths, 1) // page_size) + 1
    pages = torch.full((len(lengths) * most + 1, page_size, 2 * kv_heads, 16), math.nan, dtype=dtype)
    table = torch.randperm(len(pages) - 1)[: len(lengths) * most].view(len(lengths), most).int() + 1
    query = torch.randn(len(lengths), heads, 16, dtype=dtype)
    for row, used in enumerate(lengths):
        slot = torch.arange(used - min(used, window or used), used)
        values = torch.randn(len(slot), 2 * kv_heads, 16, dtype=dtype)
        pages[table[row][slot // page_size].long(), slot % page_size] = values
    key, value = pages.chunk(2, dim=2)
    return {
        "query": query,
        "key": key,
        "value": value,
        "table": table,
        "length": torch.tensor(lengths, dtype=torch.int32),
    }


def in_one_piece(p: dict[str, Any], row: int) -> dict[str, Any]:
    """The row's arguments for decode_attention."""
    used, window = int(p["length"][row]), p.get("sliding_window") or 1 << 30
    slot = torch.arange(max(0, used - window), used)
    page, within = p["table"][row].long()[slot // p["key"].shape[1]], slot % p["key"].shape[1]
    return {
        "query": p["query"][row : row + 1],
        "key": p["key"][page, within][None],
        "value": p["value"][page, within][None],
        "position": torch.zeros(1, len(slot), dtype=torch.int32),
        "scale": p.get("scale"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 13, 500])
@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
def test_pages(page_size: int, window: int | None, backend: str) -> None:
    p = paged([70, 0, 1, 64, 133], page_size, window=window) | {"sliding_window": window, "scale": 0.4}
    y = paged_decode_attention(**p, backend=backend)
    for row in range(len(y)):
        exact = truth(in_one_piece(p, row))[0]
        assert (y[row] - exact).abs().max() <= 3e-6 * exact.abs().max().clamp(min=1e-3)
    assert y[1].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
def test_pages_in_half_precision(dtype: torch.dtype, backend: str) -> None:
    p = paged([1000, 257], 32, 8, 2, dtype)
    y = paged_decode_attention(**p, backend=backend)
    assert y.dtype == dtype
    for row in range(2):
        exact = truth(in_one_piece(p, row))[0]
        assert (y[row] - exact).abs().max() <= 2 * HALF[dtype] * exact.abs().max()


@pytest.mark.parametrize("backend", GPU)
def test_one_graph_for_all_lengths_of_all_rows(backend: str) -> None:
    p = paged([3000, 2900], 64, 8, 2)
    paged_decode_attention(**p, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = paged_decode_attention(**p, backend=backend)
    for lengths in ((1, 64), (65, 0), (3000, 2000)):
        p["length"].copy_(torch.tensor(lengths))
        y.fill_(math.nan)
        graph.replay()
        exact = paged_decode_attention(**{k: v.cpu() for k, v in p.items()}, backend="reference")
        torch.testing.assert_close(y.cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_pages(backend: str) -> None:
    arguments = (*paged([5, 9], 4).values(), 3, 0.25, backend)
    torch.library.opcheck(torch.ops.statespan.paged_decode_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 4)}, r"query must be \[b h p\], got \[2, 4\]"),
        ({"key": torch.randn(7, 4, 2, 8)}, r"key must be \[n page_size g p\] = \[7, 4, 2, 16\], got \[7, 4, 2, 8\]"),
        ({"table": torch.zeros(3, 3).int()}, r"table must be \[b m\] = \[2, 3\], got \[3, 3\]"),
        ({"length": torch.zeros(1).int()}, r"length must be \[b\] = \[2\], got \[1\]"),
        ({"query": torch.randn(2, 5, 16)}, "the 2 kv heads must divide h = 5"),
        ({"query": torch.randn(2, 4, 16).bfloat16()}, "query is torch.bfloat16 and key torch.float32; they must agree"),
        ({"sliding_window": 0}, "a sliding_window holds the newest slot at least, got 0"),
    ],
)
def test_mistakes_with_pages_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        paged_decode_attention(**paged([5, 8], 4) | change)
    assert "\n" not in str(caught.value)
