"""One suite that every mixer has to pass: the contract of docs/architecture.md on state, segments and padding."""

import pytest
import torch
from torch import Tensor

from statespan.layers.attention import Attention
from statespan.layers.config import (
    AttentionConfig,
    LSSLConfig,
    Mamba1Config,
    Mamba2Config,
    RecurrentConfig,
    S4Config,
    S4DConfig,
    S6Config,
)
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mixer import Mixer
from statespan.layers.recurrent import Recurrent
from statespan.layers.s4 import LSSL, S4, S4D
from statespan.layers.s6 import S6

HIDDEN = 24
MIXERS = {
    "mamba1": lambda: Mamba1(HIDDEN, Mamba1Config(state_size=5)),
    "mamba1-jamba": lambda: Mamba1(HIDDEN, Mamba1Config(inner_norms=True, proj_bias=True, conv_bias=False)),
    "mamba1-zoh": lambda: Mamba1(HIDDEN, Mamba1Config(discretization="zoh", conv_kernel=2)),
    "mamba2": lambda: Mamba2(HIDDEN, Mamba2Config(state_size=6, head_dim=8, chunk_size=4)),
    "mamba2-groups": lambda: Mamba2(
        HIDDEN, Mamba2Config(state_size=6, head_dim=8, num_groups=2, norm_before_gate=True, chunk_size=8)
    ),
    "mamba2-plain": lambda: Mamba2(HIDDEN, Mamba2Config(head_dim=4, gated_norm=False, proj_bias=True)),
    "attention": lambda: Attention(HIDDEN, AttentionConfig(num_heads=4)),
    "attention-rope-gqa": lambda: Attention(
        HIDDEN, AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=10, rope_theta=100.0, qkv_bias=True)
    ),
    "attention-partial-rope": lambda: Attention(
        HIDDEN, AttentionConfig(num_heads=3, rope_theta=1e4, rotary_dim=4, rotary_interleaved=True, out_bias=True)
    ),
    "attention-window": lambda: Attention(
        HIDDEN, AttentionConfig(num_heads=4, num_kv_heads=1, rope_theta=50.0, sliding_window=3)
    ),
    "attention-learned-positions": lambda: Attention(HIDDEN, AttentionConfig(num_heads=4, learned_positions=32)),
    "attention-conv": lambda: Attention(HIDDEN, AttentionConfig(num_heads=4, num_kv_heads=2, conv_kernel=4)),
    "s4": lambda: S4(HIDDEN, S4Config(state_size=6)),
    "s4-mamba-block": lambda: S4(HIDDEN, S4Config(state_size=4, block="mamba", expand=2)),
    "s4d": lambda: S4D(HIDDEN, S4DConfig(state_size=6, block="s5", proj_bias=True)),
    "s4d-h3-block": lambda: S4D(HIDDEN, S4DConfig(state_size=4, block="h3", init="legs", conv_kernel=3)),
    "s4d-real": lambda: S4D(HIDDEN, S4DConfig(state_size=5, init="real", discretization="bilinear", block="gelu")),
    "lssl": lambda: LSSL(HIDDEN, LSSLConfig(state_size=5)),
    "s6": lambda: S6(HIDDEN, S6Config(state_size=5)),
    "s6-h3-block": lambda: S6(HIDDEN, S6Config(state_size=4, block="h3", conv_kernel=3)),
    "lstm": lambda: Recurrent(HIDDEN, RecurrentConfig(), "lstm"),
    "gru": lambda: Recurrent(HIDDEN, RecurrentConfig(bias=False), "gru"),
}


@pytest.fixture(params=MIXERS)
def mixer(request: pytest.FixtureRequest) -> Mixer:
    built = MIXERS[request.param]().double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return built


def start(mixer: Mixer, batch: int) -> object:
    return mixer.new_state(batch, torch.device("cpu"), torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_zero_state_changes_nothing(mixer: Mixer) -> None:
    hidden = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    plain, none = mixer(hidden)
    stated, state = mixer(hidden, start(mixer, 2))
    assert none is None
    assert state is not None
    close(stated, plain)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 1, 6], [2, 9], [10, 1]])
def test_chunks_equal_whole(mixer: Mixer, sizes: list[int], grad: bool) -> None:
    hidden = torch.randn(2, 11, HIDDEN, dtype=torch.float64)
    whole, _ = mixer(hidden)
    state, parts = start(mixer, 2), []
    with torch.set_grad_enabled(grad):
        for piece in hidden.split(sizes, dim=1):
            out, state = mixer(piece, state)
            parts.append(out)
    close(torch.cat(parts, dim=1), whole)


def test_gradient_flows_through_the_state(mixer: Mixer) -> None:
    hidden = torch.randn(1, 8, HIDDEN, dtype=torch.float64)
    whole_input, parts_input = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weight = torch.randn(1, 8, HIDDEN, dtype=torch.float64)
    (mixer(whole_input)[0] * weight).sum().backward()
    first, state = mixer(parts_input[:, :5], start(mixer, 1))
    second, _ = mixer(parts_input[:, 5:], state)
    (torch.cat([first, second], dim=1) * weight).sum().backward()
    close(parts_input.grad, whole_input.grad)


def test_packed_segments_equal_separate_sequences(mixer: Mixer) -> None:
    pieces = [torch.randn(1, size, HIDDEN, dtype=torch.float64) for size in (4, 1, 6)]
    segments = torch.tensor([[3] * 4 + [7] * 1 + [2] * 6])
    packed, state = mixer(torch.cat(pieces, dim=1), start(mixer, 1), segments)
    close(packed, torch.cat([mixer(piece)[0] for piece in pieces], dim=1))
    # The state is that of the last document alone: continuing it equals continuing that document.
    more = torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    continued, _ = mixer(more, state)
    close(continued, mixer(torch.cat([pieces[-1], more], dim=1))[0][:, 6:])


def test_first_segment_continues_the_state(mixer: Mixer) -> None:
    hidden = torch.randn(1, 12, HIDDEN, dtype=torch.float64)
    _, state = mixer(hidden[:, :4], start(mixer, 1))
    out, _ = mixer(hidden[:, 4:], state, torch.tensor([[0] * 3 + [1] * 5]))
    close(out[:, :3], mixer(hidden[:, :7])[0][:, 4:])
    close(out[:, 3:], mixer(hidden[:, 7:])[0])


PADDED = {
    "left": [[-1, -1, -1, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0]],
    "right": [[0, 0, 0, 0, -1, -1, -1], [0, 0, 0, 0, 0, 0, -1]],
    "middle": [[0, -1, 0, 0, -1, -1, 0], [0, 0, -1, 0, 0, 0, 0]],
    "whole row": [[-1] * 7, [0] * 7],
    "packed": [[-1, 0, 0, 1, -1, 1, 1], [0, -1, 1, 1, 1, 2, -1]],
}


@pytest.mark.parametrize("kind", PADDED)
def test_padding_is_invisible(mixer: Mixer, kind: str) -> None:
    """Outputs of real tokens, and everything that follows, are as if the padding were not there."""
    segments = torch.tensor(PADDED[kind])
    hidden = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    before = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    after = torch.randn(2, 4, HIDDEN, dtype=torch.float64)
    _, state = mixer(before, start(mixer, 2))
    out, state = mixer(hidden, state, segments)
    out_after, state = mixer(after[:, :3], state)
    last, _ = mixer(after[:, 3:], state)
    for row in range(2):
        real = segments[row] >= 0
        _, alone = mixer(before[row : row + 1], start(mixer, 1))
        if real.any():
            expected, alone = mixer(hidden[row : row + 1, real], alone, segments[row : row + 1, real])
            close(out[row : row + 1, real], expected)
        expected_after, _ = mixer(after[row : row + 1], alone)
        close(torch.cat([out_after, last], dim=1)[row : row + 1], expected_after)


def test_a_state_is_a_value(mixer: Mixer) -> None:
    """Running twice from one state gives the same both times, and leaves what a fork sees alone."""
    hidden = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    other = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(hidden, start(mixer, 2))
        first, kept = mixer(hidden[:, :1], state)
        mixer(other[:, :1], state)
        mixer(other, kept)
        again, _ = mixer(hidden[:, :1], state)
        close(again, first)
        swapped, _ = mixer(hidden[:, :1].flip(0), state.select(torch.tensor([1, 0])))
        close(swapped, first.flip(0))
        follow, _ = mixer(hidden[:, 1:2], kept)
        copy, _ = mixer(hidden[:, 1:2], kept.clone())
        close(copy, follow)


def test_float32_parameters_survive_a_cast() -> None:
    for name in ("mamba1", "mamba2", "s4", "s4d-h3-block", "s4d-real", "lssl"):
        mixer = MIXERS[name]()
        before = {key: getattr(mixer, key).detach().clone() for key in mixer.float32_parameters}
        mixer.to(torch.bfloat16)
        for key, value in before.items():
            assert getattr(mixer, key).dtype == torch.float32
            assert torch.equal(getattr(mixer, key), value)
        assert mixer.out_proj.weight.dtype == torch.bfloat16
        assert mixer.to("meta").D.dtype == torch.float32
        assert mixer.double().D.dtype == torch.float64
