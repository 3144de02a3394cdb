"""The cache of keys and values: what a sliding window and ended documents leave behind is let go."""

import pytest
import torch

from statespan.errors import UserError
from statespan.layers.attention import Attention
from statespan.layers.config import AttentionConfig

HIDDEN, WINDOW = 16, 6
PREFILL = {
    "plain": None,
    "left": [[-1, -1, -1, 0, 0, 0, 0], [0] * 7],
    "right": [[0, 0, 0, 0, -1, -1, -1], [0] * 7],
    "packed": [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
}


def attention(window: int | None) -> Attention:
    torch.manual_seed(2)
    config = AttentionConfig(num_heads=2, num_kv_heads=1, rope_theta=50.0, sliding_window=window)
    mixer = Attention(HIDDEN, config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return mixer


@pytest.mark.parametrize("kind", PREFILL)
def test_a_window_bounds_the_cache_whatever_was_read_before(kind: str) -> None:
    mixer, steps = attention(WINDOW), 400
    segments = None if PREFILL[kind] is None else torch.tensor(PREFILL[kind])
    hidden = torch.randn(2, 7 + steps, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(hidden[:, :7], mixer.new_state(2, torch.device("cpu"), torch.float64), segments)
        outputs, most = [], 0
        for t in range(7, 7 + steps):
            out, state = mixer(hidden[:, t : t + 1], state)
            outputs.append(out)
            most = max(most, state.key.shape[1])
        assert most <= 64  # the smallest buffer there is
        if segments is None:
            segments = torch.zeros(2, 7, dtype=torch.int64)
        everything = torch.cat([segments, segments.amax(1, keepdim=True).expand(-1, steps)], dim=1)
        whole, _ = mixer(hidden, segments=everything)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[:, 7:], rtol=1e-9, atol=1e-9)


def test_a_row_that_waits_keeps_what_it_still_sees() -> None:
    """Row 1 is padding for a long time: its window stays while row 0 goes on."""
    mixer = attention(WINDOW)
    hidden = torch.randn(2, 7 + 200 + 1, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(hidden[:, :7], mixer.new_state(2, torch.device("cpu"), torch.float64))
        for t in range(7, 207):
            _, state = mixer(hidden[:, t : t + 1], state, torch.tensor([[0], [-1]]))
        out, _ = mixer(hidden[:, 207:], state)
        first, _ = mixer(hidden[:1])
        second, _ = mixer(torch.cat([hidden[1:, :7], hidden[1:, 207:]], dim=1))
    torch.testing.assert_close(out, torch.cat([first[:, -1:], second[:, -1:]]), rtol=1e-9, atol=1e-9)
    assert state.key.shape[1] <= 64


def test_ended_documents_leave_the_cache() -> None:
    """Without a window too. Calls are cut inside documents: their first segment goes on with the state's document."""
    mixer = attention(None)
    hidden = torch.randn(2, 1000, HIDDEN, dtype=torch.float64)
    segments = ((torch.arange(1000) + 3) // 10).expand(2, -1)
    with torch.no_grad():
        state, parts = mixer.new_state(2, torch.device("cpu"), torch.float64), []
        for start in range(0, 1000, 25):
            out, state = mixer(hidden[:, start : start + 25], state, segments[:, start : start + 25])
            parts.append(out)
            assert state.key.shape[1] <= 128
        whole, _ = mixer(hidden, segments=segments)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_learnt_positions_are_counted_in_each_sequence() -> None:
    """By hand: the input of a layer without them, plus a row of the table for each token's place in its document."""
    torch.manual_seed(0)
    mixer = Attention(HIDDEN, AttentionConfig(num_heads=2, learned_positions=8)).double()
    plain = Attention(HIDDEN, AttentionConfig(num_heads=2)).double()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("position_embedding")})
    hidden, segments = torch.randn(1, 9, HIDDEN, dtype=torch.float64), torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, -1]])
    places = torch.tensor([0, 0, 1, 2, 3, 0, 1, 2, 0])
    out, _ = mixer(hidden, segments=segments)
    expected, _ = plain(hidden + mixer.position_embedding.weight[places], segments=segments)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_text_longer_than_the_learnt_positions() -> None:
    mixer = Attention(HIDDEN, AttentionConfig(num_heads=2, learned_positions=8))
    state = mixer.new_state(1, torch.device("cpu"), torch.float32)
    _, state = mixer(torch.randn(1, 8, HIDDEN), state)
    with pytest.raises(UserError, match="9 tokens, more than attention"):
        mixer(torch.randn(1, 1, HIDDEN), state)
