"""The feed-forward layer against its formula in float64, with every gradient."""

import pytest
import torch

from statespan.layers.config import MLPConfig
from statespan.layers.mlp import MLP


def by_hand(layer: MLP, x: torch.Tensor) -> torch.Tensor:
    """One token and one inner unit at a time, written from the equations."""
    parameters = {name: value.double() for name, value in layer.named_parameters()}
    gated = layer.activation in ("swiglu", "geglu")
    up, down = parameters["gate_up_proj.weight" if gated else "up_proj.weight"], parameters["down_proj.weight"]
    up_bias = parameters.get("gate_up_proj.bias" if gated else "up_proj.bias", torch.zeros(up.shape[0]).double())
    down_bias = parameters.get("down_proj.bias", torch.zeros(down.shape[0]).double())
    inner_size = down.shape[1]

    def inner(token: torch.Tensor, unit: int) -> torch.Tensor:
        a = token @ up[unit] + up_bias[unit]
        if gated:
            gate = a / (1 + torch.exp(-a)) if layer.activation == "swiglu" else a * 0.5 * (1 + torch.erf(a / 2**0.5))
            return gate * (token @ up[inner_size + unit] + up_bias[inner_size + unit])
        if layer.activation == "gelu":
            return a * 0.5 * (1 + torch.erf(a / 2**0.5))
        if layer.activation == "relu":
            return a * (a > 0)
        return a / (1 + torch.exp(-a))

    rows = [torch.stack([inner(token, unit) for unit in range(inner_size)]) @ down.T + down_bias for token in x]
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "silu"])
def test_value_and_gradients(activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = MLP(5, MLPConfig(intermediate_size=7, activation=activation, bias=bias)).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    out_weight = torch.randn(2, 3, 5, dtype=torch.float64)
    output, metrics = layer(x)
    assert metrics is None
    truth = by_hand(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)
    inputs = [x, *layer.parameters()]
    ours = torch.autograd.grad((output * out_weight).sum(), inputs)
    theirs = torch.autograd.grad((truth * out_weight).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def test_parameter_names() -> None:
    names = {name for name, _ in MLP(4, MLPConfig(intermediate_size=6, bias=True)).named_parameters()}
    assert names == {"gate_up_proj.weight", "gate_up_proj.bias", "down_proj.weight", "down_proj.bias"}
    names = {name for name, _ in MLP(4, MLPConfig(intermediate_size=6, activation="relu")).named_parameters()}
    assert names == {"up_proj.weight", "down_proj.weight"}


def test_without_gradients_the_values_are_the_same() -> None:
    torch.manual_seed(0)
    layer = MLP(16, MLPConfig(intermediate_size=24))
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        streamed = layer(x)[0]
    torch.testing.assert_close(streamed, layer(x)[0], rtol=1e-5, atol=1e-6)
