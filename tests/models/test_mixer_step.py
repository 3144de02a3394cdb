"""Steps on memory that stays where it is, against the layers' own: outputs, states, and room that runs out."""

import pytest
import torch

from statespan.layers.attention import Attention
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config
from statespan.layers.kv_cache import KVCache
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.norm import RMSNorm
from statespan.models import mixer_step
from statespan.models.mixer_step import StaticAttention, StaticSSM, layer_step, ssm_forward

WIDTH, ROWS = 32, 3
ATTENTION = {
    "plain": AttentionConfig(num_heads=4),
    "rope, groups": AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=50.0),
    "window": AttentionConfig(num_heads=4, num_kv_heads=1, rope_theta=50.0, sliding_window=5),
    "learned positions": AttentionConfig(num_heads=4, learned_positions=20),
    "conv": AttentionConfig(num_heads=4, rope_theta=50.0, rotary_interleaved=True, conv_kernel=3),
}


def built(layer: torch.nn.Module) -> tuple[torch.nn.Module, RMSNorm]:
    norm = RMSNorm(WIDTH, 1e-5)
    for parameter in (*layer.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.requires_grad_(False).eval(), norm.requires_grad_(False)


def started(layer: torch.nn.Module, norm: RMSNorm, padded: bool):
    """A state after a few tokens, some of them padding."""
    prompt = torch.randn(ROWS, 6, WIDTH)
    segments = torch.zeros(ROWS, 6, dtype=torch.int64) if padded else None
    if segments is not None:
        segments[1, :2] = segments[2, :4] = -1
    _, state = layer(norm(prompt), layer.new_state(ROWS, torch.device("cpu"), torch.float32), segments)
    return state


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("name", ATTENTION)
@torch.inference_mode()
def test_static_attention_equals_the_layer(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the buffer grows, and twice from one state."""
    monkeypatch.setattr(mixer_step, "GRAIN", 2)
    monkeypatch.setattr(mixer_step, "AHEAD", 3)
    layer, norm = built(Attention(WIDTH, ATTENTION[name]))
    state = started(layer, norm, padded)
    static = StaticAttention(layer, norm, layer.new_state(ROWS, torch.device("cpu"), torch.float32))
    moves = 0
    for _ in range(2):
        plain, moves = layer_step(layer, norm), 0
        plain.start(state, 0)
        static.start(state, 2)
        for token in range(11):
            hidden = torch.randn(ROWS, WIDTH)
            moves += static.make_room()
            torch.testing.assert_close(static(hidden), plain(hidden), rtol=1e-5, atol=1e-5)
            if token in (0, 10):
                ours, theirs = static.state(), plain.state()
                assert isinstance(ours, KVCache) and isinstance(theirs, KVCache)
                assert ours.length == theirs.length - ours.dropped + theirs.dropped
                assert torch.equal(ours.next_position, theirs.next_position)
                went_on, _ = layer(norm(hidden[:, None]), ours)
                torch.testing.assert_close(went_on, layer(norm(hidden[:, None]), theirs)[0], rtol=1e-5, atol=1e-5)
    assert moves == 0, "the second time there was room"


@pytest.mark.parametrize("name", ["plain", "conv"])
@torch.inference_mode()
def test_a_cache_is_not_held_twice(name: str) -> None:
    """A prompt's buffers are gone on in; the state keeps its value, and whoever else goes on from it copies them."""
    layer, norm = built(Attention(WIDTH, ATTENTION[name]))
    state = started(layer, norm, False)
    assert state.length < state.key.shape[1] - 8
    state.key[:, state.length :] = torch.nan  # what nobody wrote
    copy = state.clone()
    steps = [StaticAttention(layer, norm, layer.new_state(ROWS, torch.device("cpu"), torch.float32)) for _ in range(2)]
    for step in steps:
        step.start(state, 8)
    held = [step._cache.key.data_ptr() == state.key.data_ptr() for step in steps]
    assert held == [True, False]
    for token in range(8):
        hidden = torch.randn(2, ROWS, WIDTH)
        for step, own in zip(steps, hidden, strict=True):
            step.make_room()
            assert step(own).isfinite().all(), token
    expected, after = layer(norm(hidden[0, :, None]), copy)
    found, theirs = layer(norm(hidden[0, :, None]), state)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(state.next_position, copy.next_position) and torch.equal(
        after.next_position, theirs.next_position
    )
    assert theirs.key.data_ptr() != state.key.data_ptr()
    plain = layer_step(layer, norm)
    again = StaticAttention(layer, norm, layer.new_state(ROWS, torch.device("cpu"), torch.float32))
    plain.start(copy, 8)
    again.start(copy.clone(), 8)
    for _ in range(8):
        own = torch.randn(ROWS, WIDTH)
        again.make_room()
        torch.testing.assert_close(again(own), plain(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@torch.inference_mode()
def test_a_static_state_is_overwritten(kind: str) -> None:
    layer, norm = built(
        Mamba1(WIDTH, Mamba1Config(state_size=4))
        if kind == "mamba1"
        else Mamba2(WIDTH, Mamba2Config(state_size=8, head_dim=16))
    )
    state = started(layer, norm, False)
    before = state.clone()
    memory = layer.new_state(ROWS, torch.device("cpu"), torch.float32)
    static, plain = StaticSSM(ssm_forward(layer, norm), memory), layer_step(layer, norm)
    static.start(state, 9)
    plain.start(state, 9)
    for _ in range(3):
        hidden = torch.randn(ROWS, WIDTH)
        torch.testing.assert_close(static(hidden.clone()), plain(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory.ssm, plain.state().ssm)
    assert torch.equal(state.ssm, before.ssm) and torch.equal(state.conv, before.conv)
    kept = static.state()
    static(hidden)
    assert not torch.equal(kept.ssm, static.state().ssm)
