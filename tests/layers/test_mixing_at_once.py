"""What GPUs run as one op when they train is what the mixers compute op by op: outputs, states, every gradient."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from statespan.layers.config import Mamba1Config, Mamba2Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm

MIXERS = {
    "mamba1": lambda: Mamba1(16, Mamba1Config(state_size=4)),
    "mamba1 with inner norms": lambda: Mamba1(
        16, Mamba1Config(state_size=4, inner_norms=True, conv_bias=False, proj_bias=True)
    ),
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

    update = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True) if packed else None
    norm = RMSNorm(16, 1e-5).double()
    torch.nn.init.normal_(norm.weight)

    def results(mix: Callable[..., Any]) -> tuple[Tensor, ...]:
        total, output, after = mix(mixer, norm, hidden, update, state, segments)
        outputs = (total, output, after.conv, after.ssm)
        leaves = [hidden, *([update] if packed else []), norm.weight, *mixer.parameters()]
        return *outputs, *torch.autograd.grad([value.sin().sum() for value in outputs], leaves)

    at_once = type(mixer)._add_and_mix_at_once
    torch.testing.assert_close(results(at_once), results(Mixer.add_and_mix), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MIXERS if "inner norms" not in name])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_out_proj_may_add_to_the_stream(name: str, packed: bool) -> None:
    """What GPUs run without gradients: the sum in the place of its two parts, in memory that may be overwritten."""
    torch.manual_seed(0)
    mixer, norm = MIXERS[name]().double(), RMSNorm(16, 1e-5).double()
    hidden, update = torch.randn(2, 13, 16, dtype=torch.float64), torch.randn(2, 13, 16, dtype=torch.float64)
    state = mixer.new_state(2, torch.device("cpu"), torch.float64)
    segments = torch.tensor([[0] * 6 + [1] * 7, [-1] * 3 + [0] * 10]) if packed else None
    for given in (update, None):
        before = hidden.clone()
        total, output, after = Mixer.add_and_mix(mixer, norm, hidden, given, state, segments)
        found, nothing, found_after = mixer._mix_and_add(norm, hidden, given, state, segments)
        assert nothing is None
        torch.testing.assert_close(found, (before if given is None else total) + output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((found_after.conv, found_after.ssm), (after.conv, after.ssm))
        assert torch.equal(hidden, before) == (given is not None)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("device", ["cuda"] if torch.cuda.is_available() else [])
@pytest.mark.parametrize("overwrite", [False, True])
@torch.no_grad()
def test_inference_on_a_gpu_in_bfloat16(name: str, device: str, overwrite: bool) -> None:
    """Closer to float64 than 1.2 times what the parts reach; chunks and padding included, the input as it may be."""
    torch.manual_seed(0)
    mixer, norm = MIXERS[name]().to(torch.bfloat16), RMSNorm(16, 1e-5).to(torch.bfloat16)
    exact_mixer, exact_norm = copy.deepcopy(mixer).double(), copy.deepcopy(norm).double()
    mixer, norm = mixer.to(device), norm.to(device)
    hidden, segments = torch.randn(2, 70, 16), torch.tensor([[0] * 30 + [1] * 40, [-1] * 9 + [0] * 61])
    state = exact_mixer.new_state(2, torch.device("cpu"), torch.float64)
    total, output, after = Mixer.add_and_mix(exact_mixer, exact_norm, hidden.double(), None, state, segments)
    exact = (total + output, after.ssm)

    def errors(mix: Callable[..., Any], **options: bool) -> list[Tensor]:
        given = hidden.to(device)
        begin = mixer.new_state(2, torch.device(device), torch.bfloat16)
        total, output, after = mix(mixer, norm, given, None, begin, segments.to(device), **options)
        assert overwrite or torch.equal(given.cpu(), hidden)
        found = (total if output is None else total + output, after.ssm)
        return [(one.double().cpu() - two).norm() / two.norm() for one, two in zip(found, exact, strict=True)]

    for error, usual in zip(
        errors(type(mixer).add_and_mix, overwrite=overwrite), errors(Mixer.add_and_mix), strict=True
    ):
        assert error <= 1.2 * usual + 1e-3
