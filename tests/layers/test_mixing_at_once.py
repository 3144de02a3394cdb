"""What GPUs run as one op when they train is what the mixers compute op by op: outputs, states, every gradient."""

import pytest
import torch
from torch import Tensor

from statespan.layers.config import Mamba1Config, Mamba2Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2

MIXERS = {
    "mamba1": lambda: Mamba1(16, Mamba1Config(state_size=4)),
    "mamba1 with inner norms": lambda: Mamba1(16, Mamba1Config(state_size=4, inner_norms=True, conv_bias=False)),
    "mamba2": lambda: Mamba2(16, Mamba2Config(state_size=8, head_dim=8, num_groups=2)),
    "mamba2 with a norm before the gate": lambda: Mamba2(
        16, Mamba2Config(state_size=8, head_dim=8, norm_before_gate=True, dt_limit=(0.1, 1.0))
    ),
    "mamba2 without a norm": lambda: Mamba2(16, Mamba2Config(state_size=8, head_dim=8, gated_norm=False)),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_agree(name: str, packed: bool) -> None:
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    state = mixer.new_state(2, torch.device("cpu"), torch.float64)
    state = type(state)(torch.randn_like(state.conv), torch.randn_like(state.ssm))
    segments = torch.tensor([[0] * 6 + [1] * 7, [-1] * 3 + [0] * 10]) if packed else None

    def results(way: str) -> tuple[Tensor, ...]:
        outputs = getattr(mixer, way)(mixer.in_proj(hidden), state, segments)
        total = sum(output.sin().sum() for output in outputs)
        wanted = [p for n, p in mixer.named_parameters() if "out_proj" not in n]
        assert isinstance(total, Tensor)
        return *outputs, *torch.autograd.grad(total, [hidden, *wanted])

    torch.testing.assert_close(results("_mix_at_once"), results("_mix"), rtol=1e-9, atol=1e-10)
