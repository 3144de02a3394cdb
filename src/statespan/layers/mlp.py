"""The position-wise feed-forward layer."""

from torch import Tensor, nn

from statespan.layers.config import MLPConfig
from statespan.layers.linear import Linear, projection_of
from statespan.layers.norm import RMSNorm
from statespan.ops.activation import GATED, activate
from statespan.ops.decode_step import FeedForwardWeights


class MLP(nn.Module):
    """Feed-forward layer: y = W_down (silu(W_gate x) * W_up x)   (SwiGLU, arXiv 2002.05202), or y = W_down act(W_up x).

    Args:
        hidden_size: width of input and output.
        config: intermediate size, activation and biases.

    Example:
        >>> import torch
        >>> MLP(8, MLPConfig(intermediate_size=32))(torch.zeros(1, 3, 8))[0].shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, hidden_size: int, config: MLPConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation in GATED:
            self.gate_up_proj = Linear(hidden_size, 2 * config.intermediate_size, bias=config.bias)
        else:
            self.up_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor, segments: Tensor | None = None) -> tuple[Tensor, None]:
        """hidden [b t h] -> ([b t h], None). Tokens do not meet here, so segments do not matter."""
        return self.down_proj(activate(self._up(hidden), self.activation)), None

    @property
    def _up(self) -> Linear:
        return self.gate_up_proj if self.activation in GATED else self.up_proj

    def step_weights(self, norm: RMSNorm) -> FeedForwardWeights:
        """What a prepared decoding step of h + mlp(norm(h)) reads."""
        up, down = projection_of(self._up), projection_of(self.down_proj)
        return FeedForwardWeights(norm.weight, norm.epsilon, up, down, self.activation)
