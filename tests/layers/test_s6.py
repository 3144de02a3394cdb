"""S6 in other blocks: with Mamba's it is Mamba, in S4's and H3's it is the equations by hand."""

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.inspection import hidden_attention, selection_of
from statespan.layers.config import Mamba1Config, S6Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.s6 import S6
from statespan.models.accounting import count_parameters
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

HIDDEN = 20


def s6(block: str, expand: int = 1) -> S6:
    torch.manual_seed(1)
    mixer = S6(HIDDEN, S6Config(state_size=5, block=block, expand=expand)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return mixer


def scan_by_hand(mixer: S6, u: Tensor) -> Tensor:
    """A loop over time of the paper's recurrence, one row."""
    dt, B, C = mixer.x_proj(u).split([mixer.rank, mixer.state_size, mixer.state_size], -1)
    dt = F.softplus(mixer.dt_proj(dt) + mixer.dt_bias)
    state, outputs = torch.zeros(mixer.inner_size, mixer.state_size, dtype=u.dtype), list[Tensor]()
    for t in range(len(u)):
        state = torch.exp(-dt[t, :, None] * mixer.A_log.exp()) * state + (dt[t] * u[t])[:, None] * B[t]
        outputs.append(state @ C[t] + mixer.D * u[t])
    return torch.stack(outputs)


def test_in_mambas_block_it_is_mamba() -> None:
    mixer, mamba = s6("mamba", expand=2), Mamba1(HIDDEN, Mamba1Config(state_size=5)).double()
    mamba.load_state_dict(mixer.state_dict())
    hidden = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    segments = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0] * 11 + [-1, -1]])
    torch.testing.assert_close(mixer(hidden, segments=segments)[0], mamba(hidden, segments=segments)[0])
    mine, theirs = selection_of(mixer, hidden[:1]), selection_of(mamba, hidden[:1])
    torch.testing.assert_close(hidden_attention(mine, [0, 7]), hidden_attention(theirs, [0, 7]))


def test_in_s4s_block_by_hand() -> None:
    mixer, hidden = s6("glu"), torch.randn(1, 11, HIDDEN, dtype=torch.float64)
    expected = F.glu(mixer.out_proj(F.gelu(scan_by_hand(mixer, hidden[0]))))
    torch.testing.assert_close(mixer(hidden)[0][0], expected, rtol=1e-9, atol=1e-9)


def test_in_h3s_block_by_hand() -> None:
    mixer, hidden = s6("h3"), torch.randn(1, 11, HIDDEN, dtype=torch.float64)
    key, value, query = mixer.in_proj(hidden).chunk(3, -1)
    shifted = F.conv1d(F.pad(key.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=HIDDEN).mT
    expected = mixer.out_proj(query[0] * scan_by_hand(mixer, (shifted * value)[0]))
    torch.testing.assert_close(mixer(hidden)[0][0], expected, rtol=1e-9, atol=1e-9)


def test_it_starts_as_mamba_does_and_is_counted() -> None:
    for block in ("glu", "h3"):
        config = ModelConfig(hidden_size=32, layers=(LayerSpec("s6", "mlp"),), s6=S6Config(block=block))
        model = build(config, seed=0)
        mixer = model.layers[0].mixer
        assert isinstance(mixer, S6)
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(32, 16))
        step = F.softplus(mixer.dt_bias)
        assert 1e-3 <= step.min() < step.max() <= 0.1
        assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
