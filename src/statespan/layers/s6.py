"""S6, the selective state-space model of Mamba, in the blocks of S4 and H3."""

import torch
from torch import Tensor, nn

from statespan.layers.config import S6Config
from statespan.layers.linear import Linear
from statespan.layers.ssm_block import SSMBlock
from statespan.ops import selective_scan


class S6(SSMBlock):
    """[dt|B|C] = x_proj(u); y = scan(u, dt, A, B, C) + D u (arXiv 2312.00752, algorithm 2), in the block of its config.

    The layer "mamba1" is the block "mamba" with this, and has faster kernels.
    """

    float32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, hidden_size: int, config: S6Config) -> None:
        super().__init__(hidden_size, config)
        self.config = config
        self.rank = config.rank(hidden_size)
        self.x_proj = Linear(self.inner_size, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = Linear(self.rank, self.inner_size, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(self.inner_size))
        self.A_log = nn.Parameter(torch.zeros(self.inner_size, self.state_size))
        self.D = nn.Parameter(torch.ones(self.inner_size))

    def selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: dt before bias and softplus [.. d], B and C [.. n]."""
        dt, B, C = self.x_proj(u).split([self.rank, self.state_size, self.state_size], dim=-1)
        return self.dt_proj(dt), B, C

    def state_space(self, u: Tensor, state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dt, B, C = self.selection(u)
        return selective_scan(
            u,
            dt,
            -torch.exp(self.A_log),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            dt_bias=self.dt_bias,
            initial_state=state,
            segments=segments,
            return_final_state=True,
        )
