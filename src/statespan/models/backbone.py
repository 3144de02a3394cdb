"""Block and Backbone: the whole architecture of every model of the family."""

from torch import Tensor, nn

from statespan.errors import UserError
from statespan.layers.attention import Attention
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mixer import Mixer
from statespan.layers.mlp import MLP
from statespan.layers.moe import MoE
from statespan.layers.norm import RMSNorm
from statespan.layers.recurrent import Recurrent
from statespan.layers.routing import RouterMetrics
from statespan.layers.s4 import LSSL, S4, S4D
from statespan.layers.s6 import S6
from statespan.layers.state import ModelState, State
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec


def build_mixer(config: ModelConfig, name: str) -> Mixer:
    """The mixer called `name` in the layer list."""
    match name:
        case "mamba1":
            return Mamba1(config.hidden_size, config.mamba1, config.norm_epsilon)
        case "mamba2":
            return Mamba2(config.hidden_size, config.mamba2, config.norm_epsilon)
        case "attention":
            return Attention(config.hidden_size, config.attention)
        case "s4":
            return S4(config.hidden_size, config.s4)
        case "s4d":
            return S4D(config.hidden_size, config.s4d)
        case "lssl":
            return LSSL(config.hidden_size, config.lssl)
        case "s6":
            return S6(config.hidden_size, config.s6)
        case _:
            return Recurrent(config.hidden_size, config.recurrent, name)


def build_feed_forward(config: ModelConfig, name: str) -> MLP | MoE:
    """The feed-forward layer called `name` in the layer list."""
    return MLP(config.hidden_size, config.mlp) if name == "mlp" else MoE(config.hidden_size, config.moe)


class Block(nn.Module):
    """h = h + mixer(norm(h));  h = h + feed_forward(norm(h)); either half may be absent.

    A block takes and gives the residual stream h in two parts, `hidden` and an `update` that is still to be added: the
    next norm adds it in the pass in which it reads h.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.mixer = self.feed_forward = None
        if spec.mixer is not None:
            self.mixer_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.mixer = build_mixer(config, spec.mixer)
        if spec.feed_forward is not None:
            self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.feed_forward = build_feed_forward(config, spec.feed_forward)

    def forward(
        self,
        hidden: Tensor,
        update: Tensor | None = None,
        state: State | None = None,
        segments: Tensor | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None, State | None, RouterMetrics | None]:
        """One layer on the residual stream hidden + update [b t h]: the same two, the next state, router metrics.

        With `overwrite` hidden may be changed in place.
        """
        router = None
        if self.mixer is not None:
            mixed = self.mixer.add_and_mix(self.mixer_norm, hidden, update, state, segments, overwrite)
            hidden, update, state = mixed
        if self.feed_forward is not None:
            normed, hidden = self.feed_forward_norm.add(hidden, update)
            update, router = self.feed_forward(normed, segments)
        return hidden, update, state, router


class Backbone(nn.Module):
    """The layers in order; state and segments pass through as values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config, spec) for spec in config.layers)
        self.collect_activations = config.activation_loss_coef > 0

    def forward(
        self, hidden: Tensor, state: ModelState | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, ModelState | None, tuple[RouterMetrics, ...], Tensor]:
        """Run all layers on `hidden` [b t h]; the last value is mean(h^2) over tokens and layers (Jamba-1.5)."""
        states = [None] * len(self.layers) if state is None else list(state.layers)
        if len(states) != len(self.layers):
            raise UserError(
                f"state has {len(states)} layers and the model {len(self.layers)}; "
                "it comes from another model: make one with model.new_state(batch_size)"
            )
        routers: list[RouterMetrics] = []
        activation, update, given = hidden.new_zeros(()), None, hidden
        for index, layer in enumerate(self.layers):
            hidden, update, states[index], router = layer(hidden, update, states[index], segments, hidden is not given)
            if router is not None:
                routers.append(router)
            if self.collect_activations:
                activation = activation + _sum(hidden, update).float().pow(2).mean() / len(self.layers)
        hidden = _sum(hidden, update)
        return hidden, None if state is None else ModelState(tuple(states)), tuple(routers), activation


def _sum(hidden: Tensor, update: Tensor | None) -> Tensor:
    return hidden if update is None else hidden + update
