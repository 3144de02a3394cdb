"""Mamba-1: the selective state-space mixer (arXiv 2312.00752, section 3.4), with Jamba's inner norms as an option."""

import torch
from torch import Tensor, nn

from statespan.layers.config import Mamba1Config
from statespan.layers.linear import Linear, projection_of
from statespan.layers.norm import RMSNorm
from statespan.layers.selective_mixer import SelectiveMixer
from statespan.layers.state import SSMState, State
from statespan.ops import (
    causal_conv1d,
    causal_conv1d_update,
    mamba1_block,
    selective_scan,
    selective_state_update,
)
from statespan.ops.decode_step import Mamba1Weights


class Mamba1(SelectiveMixer):
    """[x|z] = in_proj(h); x = silu(conv(x)); [dt|B|C] = x_proj(x); y = scan(x, dt, A, B, C) * silu(z); out_proj(y)."""

    projections = ("in_proj", "x_proj", "dt_proj", "out_proj")

    def __init__(self, hidden_size: int, config: Mamba1Config, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        inner, rank = config.inner_size(hidden_size), config.rank(hidden_size)
        self.config = config
        self.inner_size, self.rank, self.state_size = inner, rank, config.state_size
        self.norm_epsilon = norm_epsilon
        self.in_proj = Linear(hidden_size, 2 * inner, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.conv_kernel, groups=inner, bias=config.conv_bias)
        self.x_proj = Linear(inner, rank + 2 * config.state_size, bias=False)
        self.dt_proj = Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.A_log = nn.Parameter(torch.zeros(inner, config.state_size))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = Linear(inner, hidden_size, bias=config.proj_bias)
        if config.inner_norms:
            self.dt_layernorm = RMSNorm(rank, norm_epsilon)
            self.b_layernorm = RMSNorm(config.state_size, norm_epsilon)
            self.c_layernorm = RMSNorm(config.state_size, norm_epsilon)

    def _add_and_mix_at_once(
        self, norm: RMSNorm, hidden: Tensor, update: Tensor | None, state: SSMState | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, State | None]:
        hidden, output, conv, ssm = mamba1_block(
            hidden,
            update,
            norm.weight,
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.dt_bias,
            self.A_log,
            self.D,
            self.out_proj.weight,
            self.out_proj.bias,
            epsilon=norm.epsilon,
            inner_norms=self._inner_norms() or None,
            initial_conv=None if state is None else state.conv,
            initial_state=None if state is None else state.ssm,
            segments=segments,
            discretization=self.config.discretization,
            keep_projected=self.keep_projected,
            keep_convolved=self.keep_convolved,
            keep_cast=self.keep_cast,
        )
        return hidden, output, None if state is None else SSMState(conv, ssm)

    def _mix(self, xz: Tensor, state: SSMState | None, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x, z = xz.chunk(2, dim=-1)
        x, conv = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if state is None else state.conv,
            segments=segments,
            return_final_state=True,
        )
        dt, B, C = self.selection(x)
        y, ssm = selective_scan(
            x,
            dt,
            -torch.exp(self.A_log),
            B.unsqueeze(2),
            C.unsqueeze(2),
            self.D,
            z,
            dt_bias=self.dt_bias,
            initial_state=None if state is None else state.ssm,
            segments=segments,
            return_final_state=True,
            discretization=self.config.discretization,
        )
        return y, conv, ssm

    def selection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: [dt|B|C] = x_proj(x), dt_proj(dt)  (arXiv 2312.00752, Alg. 2), with inner norms.

        Args:
            x: [.. d], the conv's output.

        Returns:
            dt before its bias and softplus [.. d], B [.. n] and C [.. n].
        """
        dt, B, C = self.x_proj(x).split([self.rank, self.state_size, self.state_size], dim=-1)
        if self.config.inner_norms:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return self.dt_proj(dt), B, C

    def _step(self, hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        x, z = self.in_proj(hidden[:, 0]).chunk(2, dim=-1)
        x, conv = causal_conv1d_update(state.conv, x, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        dt, B, C = self.selection(x)
        y, ssm = selective_state_update(
            state.ssm,
            x,
            dt,
            -torch.exp(self.A_log),
            B.unsqueeze(1),
            C.unsqueeze(1),
            self.D,
            z,
            dt_bias=self.dt_bias,
            discretization=self.config.discretization,
        )
        return self.out_proj(y).unsqueeze(1), SSMState(conv, ssm)

    def _inner_norms(self) -> tuple[Tensor, Tensor, Tensor] | tuple[()]:
        """Weights of the norms of dt, B and C."""
        if not self.config.inner_norms:
            return ()
        return self.dt_layernorm.weight, self.b_layernorm.weight, self.c_layernorm.weight

    def step_weights(self, norm: RMSNorm) -> Mamba1Weights:
        return Mamba1Weights(
            norm=norm.weight,
            norm_epsilon=norm.epsilon,
            in_proj=projection_of(self.in_proj),
            conv_weight=self.conv1d.weight.squeeze(1),
            conv_bias=self.conv1d.bias,
            x_proj=projection_of(self.x_proj),
            inner_norms=self._inner_norms(),
            inner_norm_epsilon=self.norm_epsilon,
            dt_proj=projection_of(self.dt_proj),
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            out_proj=projection_of(self.out_proj),
            discretization=self.config.discretization,
        )

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        ssm_dtype = torch.promote_types(dtype, torch.float32)
        return SSMState(
            torch.zeros(batch_size, self.config.conv_kernel - 1, self.inner_size, device=device, dtype=dtype),
            torch.zeros(batch_size, self.inner_size, self.state_size, device=device, dtype=ssm_dtype),
        )
