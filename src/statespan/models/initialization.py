"""Every initial value in one table: a parameter's name decides its distribution.

| parameter | distribution | source |
|---|---|---|
| embedding, untied head | normal, standard deviation config.initializer_range | mamba, GPT-2 |
| learnt positions of attention | normal, standard deviation 1: as large as the norm's output that they are added to | |
| matrices of linear layers and experts, conv taps and biases | uniform within 1 / sqrt(fan_in) | nn.Linear, nn.Conv1d |
| out_proj and down_proj | the same, divided by sqrt(number of residual additions) | GPT-2; mamba |
| biases of linear layers, experts and routers | 0 | |
| norm weights, D | 1 | arXiv 2312.00752 |
| A_log, Mamba-1 and S6 | log(1 .. N) in every channel (S4D-Real) | arXiv 2312.00752, section 3.6 |
| A_log, Mamba-2 | log of a uniform in A_init_range | arXiv 2405.21060 |
| dt_bias | softplus^-1 of a log-uniform step size in [dt_min, dt_max], at least dt_floor | mamba |
| Mamba-1 and S6 dt_proj.weight | uniform within dt_rank^-1/2 | mamba |
| S4, S4D, LSSL log_dt | log of a log-uniform step size in [dt_min, dt_max] | arXiv 2111.00396 |
| S4 log_A_real, A_imag, P, B | HiPPO-LegS in diagonal plus low-rank form | arXiv 2111.00396, theorem 1 |
| S4D log_A_real, A_imag | LegS, Lin, Inv or Real, as config.init says | arXiv 2206.11893, section 4 |
| their C and D | normal, standard deviation 1; a complex C has it in all | s4 |
| LSTM and GRU | uniform within 1 / sqrt(hidden_size) | nn.LSTM |
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from statespan.layers.attention import Attention
from statespan.layers.config import Mamba1Config, Mamba2Config, S6Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mlp import MLP
from statespan.layers.moe import Experts
from statespan.layers.recurrent import Recurrent
from statespan.layers.s4 import S4D, LTIMixer
from statespan.layers.s6 import S6
from statespan.layers.ssm_block import SSMBlock
from statespan.models.config import ModelConfig
from statespan.ops.lti import diagonal_eigenvalues, dplr

Initializer = Callable[[Tensor], Tensor]


def initialize(model: nn.Module, config: ModelConfig, seed: int, draw_on: torch.device | str = "cpu") -> None:
    """Fill every parameter of a LanguageModel in place, with random numbers of the device `draw_on`.

    A seed gives the same values on every machine while they are drawn on the CPU; a GPU draws billions in no time.
    """
    generator = Generator(draw_on).manual_seed(seed)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner_name, _, leaf = name.rpartition(".")
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            values = torch.empty(parameter.shape, dtype=dtype, device=draw_on)
            fill = _initializer(modules, owner_name, leaf, config, generator)
            parameter.copy_(fill(values))


def _initializer(
    modules: dict[str, nn.Module], owner_name: str, leaf: str, config: ModelConfig, generator: Generator
) -> Initializer:
    owner, parent_name = modules[owner_name], owner_name.rpartition(".")[0]
    parent = modules[parent_name]
    if isinstance(owner, Mamba1 | Mamba2 | S6):
        return _state_space(owner, leaf, generator)
    if isinstance(owner, LTIMixer):
        return _time_invariant(owner, leaf, generator)
    if isinstance(owner, nn.Embedding) and isinstance(parent, Attention):
        return lambda values: values.normal_(generator=generator)
    if isinstance(owner, nn.Embedding) or owner_name == "lm_head":
        return lambda values: values.normal_(0.0, config.initializer_range, generator=generator)
    if isinstance(owner, Experts):
        return _expert(leaf, config, generator)
    if isinstance(owner, nn.Linear):
        return _linear(owner, parent, owner_name.rpartition(".")[2], leaf, config, generator)
    if isinstance(owner, nn.Conv1d):
        return _uniform(owner.kernel_size[0] ** -0.5, generator)
    if isinstance(parent, Recurrent):
        return _uniform(config.hidden_size**-0.5, generator)
    return torch.zeros_like if leaf == "bias" else torch.ones_like  # norms


def _uniform(bound: float, generator: Generator) -> Initializer:
    return lambda values: values.uniform_(-bound, bound, generator=generator)


def residual_scale(config: ModelConfig) -> float:
    """1 / sqrt(number of additions to the residual stream)."""
    additions = sum((spec.mixer is not None) + (spec.feed_forward is not None) for spec in config.layers)
    return additions**-0.5


def _linear(
    layer: nn.Linear, parent: nn.Module, name: str, leaf: str, config: ModelConfig, generator: Generator
) -> Initializer:
    if leaf == "bias":
        return torch.zeros_like
    bound = layer.in_features**-0.5
    if name == "out_proj" and isinstance(parent, Mamba1 | Mamba2 | Attention):
        bound *= residual_scale(config)
    if name == "out_proj" and isinstance(parent, SSMBlock) and parent.block != "s5":  # whose out_proj is only a gate
        bound *= residual_scale(config)
    if name == "down_proj" and isinstance(parent, MLP):
        bound *= residual_scale(config)
    return _uniform(bound, generator)


def _expert(leaf: str, config: ModelConfig, generator: Generator) -> Initializer:
    if leaf.endswith("_bias"):
        return torch.zeros_like
    if leaf == "down_proj":
        return _uniform(config.moe.intermediate_size**-0.5 * residual_scale(config), generator)
    return _uniform(config.hidden_size**-0.5, generator)


def _state_space(mixer: Mamba1 | Mamba2 | S6, leaf: str, generator: Generator) -> Initializer:
    if leaf == "D":
        return torch.ones_like
    if leaf == "dt_bias":
        return lambda values: values.copy_(_inverse_softplus(_step_sizes(mixer.config, values, generator)))
    if isinstance(mixer, Mamba1 | S6):
        return lambda values: values.copy_(values.new_ones(values.shape[1]).cumsum(0).log().expand_as(values))
    low, high = mixer.config.A_init_range
    return lambda values: values.uniform_(low, high, generator=generator).log_()


def _step_sizes(config: Mamba1Config | Mamba2Config | S6Config, like: Tensor, generator: Generator) -> Tensor:
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    return torch.empty_like(like).uniform_(low, high, generator=generator).exp_().clamp_(min=config.dt_floor)


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _time_invariant(mixer: LTIMixer, leaf: str, generator: Generator) -> Initializer:
    if leaf in ("C", "D"):  # the real and imaginary parts of a complex C share the variance
        return lambda values: values.normal_(0.0, 0.5**0.5 if values.dim() == 3 else 1.0, generator=generator)
    if leaf == "log_dt":
        low, high = math.log(mixer.config.dt_min), math.log(mixer.config.dt_max)
        return lambda values: values.uniform_(low, high, generator=generator)
    return lambda values: values.copy_(_hippo_values(mixer, leaf))


def _hippo_values(mixer: LTIMixer, leaf: str) -> Tensor:
    """Those of one channel."""
    if isinstance(mixer, S4D):
        A = diagonal_eigenvalues(mixer.init, mixer.state_size)
    else:
        form = dplr("legs", mixer.state_size)
        if leaf in ("P", "B"):
            return torch.view_as_real(form.P[0] if leaf == "P" else form.B)
        A = form.eigenvalues
    return A.imag if leaf == "A_imag" else torch.log(-A.real)
