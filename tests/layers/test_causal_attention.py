"""Attention of many tokens against the softmax written out in float64: blocks, windows, more slots than tokens."""

import math

import pytest
import torch
from torch import Tensor

from statespan.layers import causal_attention as module
from statespan.layers.attention import Attention
from statespan.layers.causal_attention import causal_attention, masked_attention, sees
from statespan.layers.config import AttentionConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


def truth(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """mask [b t s]"""
    query, key, value = (x.double().cpu() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for x in (key, value))
    score = torch.einsum("bthp,bshp->bhts", query, key) / math.sqrt(query.shape[3])
    weight = score.masked_fill(~mask.cpu().unsqueeze(1), -math.inf).softmax(-1)
    return torch.einsum("bhts,bshp->bthp", weight, value)


def tensors(tokens: int, slots: int, heads: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    both = torch.randn(2, slots, 2 * kv_heads, 16, dtype=dtype, device=DEVICE)
    return torch.randn(2, tokens, heads, 16, dtype=dtype, device=DEVICE), *both.chunk(2, dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 1 << 24], ids=["small blocks", "one block"])
@pytest.mark.parametrize("window", [None, 1, 9, 40, 1000])
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (1, 50), (37, 37), (37, 63), (2, 63)])
def test_causal(
    tokens: int, slots: int, window: int | None, blocks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MASK_ELEMENTS", blocks)
    for heads, kv_heads in ((4, 4), (6, 2)):
        query, key, value = tensors(tokens, slots, heads, kv_heads, dtype)
        y = causal_attention(query, key, value, window)
        slot = torch.arange(slots)
        exact = truth(query, key, value, sees(slot[slots - tokens :], slot, window).expand(2, -1, -1))
        limit = 2e-6 if dtype == torch.float32 else 2e-2
        assert (y.double().cpu() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize(("tokens", "slots"), [(8, 16), (8, 31), (8, 49), (12, 200)])
def test_a_long_past_in_parts(tokens: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8, 16, 32 .. slots that all tokens see, and the rest with an edge; here by the softmax written out."""
    sizes: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        score = (query @ key.mT / math.sqrt(query.shape[3])).masked_fill(~mask, -math.inf)
        return score.softmax(-1) @ value, score.logsumexp(-1)

    def whole(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(key.shape[2])
        return attend(query, key, value, torch.ones(1, dtype=torch.bool, device=key.device))

    def to_edge(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        slot = torch.arange(key.shape[2], device=key.device)
        return attend(query, key, value, sees(slot[-query.shape[2] :], slot, None))

    monkeypatch.setattr(module, "PART", 8)
    monkeypatch.setattr(module, "_seen_whole", whole)
    monkeypatch.setattr(module, "_seen_to_edge", to_edge)
    query, key, value = tensors(tokens, slots, 6, 2, torch.float32)
    y = module._joined_parts(query, key, value)
    slot = torch.arange(slots)
    exact = truth(query, key, value, sees(slot[slots - tokens :], slot, None).expand(2, -1, -1))
    assert (y.double().cpu() - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert sum(sizes) == (slots - tokens) // 8 * 8 and len(set(sizes)) == len(sizes)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("slots", [8192 + 1024, 3 * 8192 + 77 + 1024])
def test_a_long_past_on_a_gpu(slots: int) -> None:
    """On a Hopper in parts, elsewhere by one kernel."""
    query = torch.randn(1, 1024, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    key, value = torch.randn(2, 1, slots, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with torch.inference_mode():
        y = causal_attention(query, key, value)
    slot = torch.arange(slots)
    exact = truth(query, key, value, sees(slot[-1024:], slot, None).unsqueeze(0))
    assert (y.double().cpu() - exact).abs().max() <= 2e-2 * exact.abs().max()


def test_any_mask_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MASK_ELEMENTS", 1)
    query, key, value = tensors(45, 30, 6, 2, torch.float32)
    mask = torch.rand(2, 45, 30, device=DEVICE) < 0.3
    mask[..., 7] = True
    asked: list[int] = []

    def seen(part: slice) -> Tensor:
        asked.append(part.stop - part.start)
        return mask[:, part]

    y = masked_attention(query, key, value, seen)
    assert asked == [16, 16, 13]
    exact = truth(query, key, value, mask)
    assert (y.double().cpu() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_behind_a_long_cache_makes_no_mask_of_all_pairs(window: int | None) -> None:
    """Also its gradients are those of all tokens at once."""
    torch.manual_seed(3)
    config = AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=50.0, sliding_window=window)
    mixer = Attention(32, config).to(DEVICE)
    hidden = torch.randn(2, 90, 32, device=DEVICE, requires_grad=True)
    whole, _ = mixer(hidden)
    _, state = mixer(hidden[:, :50], mixer.new_state(2, hidden.device, torch.float32))
    last, _ = mixer(hidden[:, 50:], state)
    torch.testing.assert_close(last, whole[:, 50:], rtol=0, atol=2e-6)
    exact, found = (torch.autograd.grad(y.square().sum(), hidden)[0] for y in (whole[:, 50:], last))
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="the allocator that counts is a GPU's")
@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, None), (torch.float32, None), (torch.float32, 512)])
def test_memory_grows_with_tokens_not_with_pairs(dtype: torch.dtype, window: int | None) -> None:
    tokens, slots = 4096, 65_536
    query = torch.randn(1, tokens, 8, 64, dtype=dtype, device=DEVICE)
    key = torch.randn(1, slots, 2, 64, dtype=dtype, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        causal_attention(query, key, key, window)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 400 << 20, "a score of all pairs and heads in float32 takes 8 GiB, a mask 256 MiB"
