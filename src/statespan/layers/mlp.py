"""The position-wise feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from statespan.layers.config import MLPConfig
from statespan.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


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
        if config.activation == "swiglu":
            self.gate_up_proj = Linear(hidden_size, 2 * config.intermediate_size, bias=config.bias)
        else:
            self.up_proj = Linear(hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor, segments: Tensor | None = None) -> tuple[Tensor, None]:
        """hidden [b t h] -> ([b t h], None). Tokens do not meet here, so segments do not matter."""
        if self.activation == "swiglu":
            gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        else:
            inner = ACTIVATIONS[self.activation](self.up_proj(hidden))
        return self.down_proj(inner), None
