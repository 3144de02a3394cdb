"""Which parameters decay, by name, and what the optimizer does with them."""

from dataclasses import replace

import pytest
import torch

from statespan.layers.config import AttentionConfig, Mamba2Config, MoEConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.training import OptimizerConfig
from statespan.training.optimizer import build_optimizer, set_learning_rate

DECAYED = {
    "backbone.layers.0.mixer": {
        "in_proj.weight",
        "conv1d.weight",
        "x_proj.weight",
        "dt_proj.weight",
        "out_proj.weight",
    },
    "backbone.layers.1.mixer": {"in_proj.weight", "conv1d.weight", "out_proj.weight"},
    "backbone.layers.2.mixer": {"qkv_proj.weight", "out_proj.weight"},
    "backbone.layers.2.feed_forward": {"router.weight", "experts.up_proj", "experts.down_proj"},
    "backbone.layers.3.mixer.rnn": {"weight_ih_l0", "weight_hh_l0"},
    "backbone.layers.3.feed_forward": {"gate_up_proj.weight", "down_proj.weight"},
    "backbone.layers.4.mixer": {"C", "out_proj.weight"},
    "lm_head": {"weight"},
}


@pytest.fixture
def model() -> torch.nn.Module:
    """Every kind of parameter: all mixers, biased experts, an untied head."""
    config = ModelConfig(
        hidden_size=16,
        layers=(
            LayerSpec("mamba1"),
            LayerSpec("mamba2"),
            LayerSpec("attention", "moe"),
            LayerSpec("lstm", "mlp"),
            LayerSpec("s4"),
        ),
        mamba2=Mamba2Config(head_dim=8, state_size=8),
        attention=AttentionConfig(num_heads=2, qkv_bias=True, out_bias=True),
        moe=MoEConfig(num_experts=2, intermediate_size=8, bias=True, router_bias=True),
        tie_embeddings=False,
    )
    return build(config)


def test_groups_are_exactly_these(model: torch.nn.Module):
    wanted = {f"{place}.{leaf}" for place, leaves in DECAYED.items() for leaf in leaves}
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups[0.3] == wanted
    assert groups[0.0] == set(names.values()) - wanted
    rest = {name.rpartition(".")[2] for name in groups[0.0]}
    assert {"log_dt", "log_A_real", "A_imag", "P", "B"} <= rest
    assert {"A_log", "D", "dt_bias", "bias", "up_proj_bias", "down_proj_bias", "bias_hh_l0"} <= rest
    assert "embedding.weight" in groups[0.0]


def test_the_dynamics_of_s4_have_a_rate_of_their_own(model: torch.nn.Module):
    """AdamW's first step moves every value by its learning rate."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(learning_rate=0.1, lti_learning_rate=0.02, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_learning_rate(optimizer, 0.05)  # half of the peak
    optimizer.step()
    for name, parameter in model.named_parameters():
        slow = name.startswith("backbone.layers.4.") and name.endswith((".log_dt", "log_A_real", "A_imag", ".P", ".B"))
        moved = torch.full_like(parameter, -0.01 if slow else -0.05)
        torch.testing.assert_close(parameter - before[name], moved, rtol=1e-3, atol=1e-5)


def test_a_rate_on_the_device_stays_where_it_is(model: torch.nn.Module):
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, lti_learning_rate=0.01))
    rates = [torch.zeros(()) for _ in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    set_learning_rate(optimizer, torch.tensor(0.5))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        assert group["lr"] is rate
        torch.testing.assert_close(rate, torch.tensor(0.5 * group["lr_ratio"]))
    assert sorted({group["lr_ratio"] for group in optimizer.param_groups}) == pytest.approx([0.1, 1.0])


def test_decay_shrinks_the_one_group_and_not_the_other(model: torch.nn.Module):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.2)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.9 if name.endswith(("lm_head.weight", "experts.up_proj")) else None
        if factor is not None:
            torch.testing.assert_close(parameter, factor * before[name])
        if name.endswith(("A_log", "D", "dt_bias", "dt_proj.bias", "norm.weight", "embedding.weight")):
            assert torch.equal(parameter, before[name])


def test_one_update_is_adamw_by_hand():
    layer = torch.nn.Linear(3, 2)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    config = replace(OptimizerConfig(learning_rate=0.01, weight_decay=0.1), betas=(0.8, 0.9), epsilon=1e-3)
    optimizer = build_optimizer(layer, config)
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 0.5), torch.full((2,), -2.0)
    optimizer.step()  # the first step's moments, corrected, are the gradient and its square
    torch.testing.assert_close(layer.weight, before * (1 - 0.01 * 0.1) - 0.01 * 0.5 / (0.5 + 1e-3))
    torch.testing.assert_close(layer.bias, bias + 0.01 * 2.0 / (2.0 + 1e-3))


def test_frozen_parameters_are_left_alone():
    layer = torch.nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    optimizer = build_optimizer(layer, OptimizerConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
