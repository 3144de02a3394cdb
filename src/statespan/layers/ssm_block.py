"""The blocks that stand round a state-space model, time-invariant or selective: S4's, S5's, H3's and Mamba's."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, silu

from statespan.layers.config import SSMBlockConfig
from statespan.layers.linear import Linear
from statespan.layers.mixer import Mixer
from statespan.layers.state import LTIState
from statespan.ops import causal_conv1d

GATED = {"h3": 3, "mamba": 2}  # blocks with an in_proj and a conv, and how many channels it makes of one


class SSMBlock(Mixer):
    """A block round y = SSM(u), one state-space model with N states a channel; SSMBlockConfig.block says which.

    The state holds the newest inputs of the conv, where the block has one, and the SSM's state [b d n] in real numbers:
    real and imaginary parts in turns where it is complex.
    """

    def __init__(self, hidden_size: int, config: SSMBlockConfig) -> None:
        super().__init__()
        self.block, self.conv_kernel = config.block, config.conv_kernel
        self.inner_size, self.state_size = config.inner_size(hidden_size), config.state_size
        if self.block in GATED:
            self.in_proj = Linear(hidden_size, GATED[self.block] * self.inner_size, bias=config.proj_bias)
            self.conv1d = nn.Conv1d(self.inner_size, self.inner_size, self.conv_kernel, groups=self.inner_size)
        out_size = 2 * hidden_size if self.block == "glu" else hidden_size
        self.out_proj = Linear(self.inner_size, out_size, bias=config.proj_bias)

    @abstractmethod
    def state_space(self, u: Tensor, state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """SSM(u) of u [b t d], and the next state [b d n] where there is one."""

    def forward(
        self, hidden: Tensor, state: LTIState | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, LTIState | None]:
        u, gate, conv = self.enter(hidden, state, segments)
        y, ssm = self.state_space(u, None if state is None else state.ssm, segments)
        out = self._leave(y.to(u.dtype), gate)
        return out, None if state is None or ssm is None else LTIState(conv, ssm)

    def enter(self, hidden: Tensor, state: LTIState | None, segments: Tensor | None) -> tuple[Any, ...]:
        """The SSM's input [b t d], the gate of its output, and the conv's next state."""
        if self.block not in GATED:
            return hidden, None, None if state is None else state.conv
        parts = self.in_proj(hidden).chunk(GATED[self.block], dim=-1)
        x, conv = causal_conv1d(
            parts[0],
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.block == "mamba" else None,
            initial_state=None if state is None else state.conv,
            segments=segments,
            return_final_state=True,
        )
        if self.block == "mamba":
            return x, silu(parts[1]), conv
        return x * parts[1], parts[2], conv

    def _leave(self, y: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            return self.out_proj(y * gate)
        y = gelu(y)
        out = self.out_proj(y)
        match self.block:
            case "glu":
                return glu(out)
            case "s5":
                return y * torch.sigmoid(out)
            case _:
                return out

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LTIState:
        taps = self.conv_kernel - 1 if self.block in GATED else 0
        ssm_dtype = torch.promote_types(dtype, torch.float32)
        return LTIState(
            torch.zeros(batch_size, taps, self.inner_size, device=device, dtype=dtype),
            torch.zeros(batch_size, self.inner_size, self.state_size, device=device, dtype=ssm_dtype),
        )
