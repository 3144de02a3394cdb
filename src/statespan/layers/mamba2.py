"""Mamba-2: the state-space dual mixer (arXiv 2405.21060, section 7)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statespan.layers.config import Mamba2Config
from statespan.layers.linear import Linear, projection_of
from statespan.layers.norm import GatedRMSNorm, RMSNorm
from statespan.layers.selective_mixer import SelectiveMixer
from statespan.layers.state import SSMState, State
from statespan.ops import causal_conv1d, causal_conv1d_update, mamba2_block, ssd, ssd_state_update
from statespan.ops.decode_step import Mamba2Weights


class Mamba2(SelectiveMixer):
    """[z|x|B|C|dt] = in_proj(h); [x|B|C] = silu(conv(..)); y = ssd(x, dt, A, B, C); out_proj(norm(y * silu(z)))."""

    projections = ("in_proj", "out_proj")

    def __init__(self, hidden_size: int, config: Mamba2Config, norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        self.config, self.norm_epsilon = config, norm_epsilon
        self.num_heads, self.inner_size = config.heads(hidden_size), config.inner_size(hidden_size)
        self.bc_size = config.num_groups * config.state_size
        conv_size = self.inner_size + 2 * self.bc_size
        self.in_proj = Linear(hidden_size, self.inner_size + conv_size + self.num_heads, bias=config.proj_bias)
        self.conv1d = nn.Conv1d(conv_size, conv_size, config.conv_kernel, groups=conv_size, bias=config.conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(self.num_heads))
        self.A_log = nn.Parameter(torch.zeros(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        if config.gated_norm:
            self.norm = GatedRMSNorm(
                self.inner_size,
                norm_epsilon,
                num_groups=config.norm_groups or config.num_groups,
                norm_before_gate=config.norm_before_gate,
            )
        self.out_proj = Linear(self.inner_size, hidden_size, bias=config.proj_bias)

    def _add_and_mix_at_once(
        self, norm: RMSNorm, hidden: Tensor, update: Tensor | None, state: SSMState | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, State | None]:
        gated = self.config.gated_norm
        hidden, output, conv, ssm = mamba2_block(
            hidden,
            update,
            norm.weight,
            self.in_proj.weight,
            self.in_proj.bias,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm.weight if gated else None,
            self.out_proj.weight,
            self.out_proj.bias,
            epsilon=norm.epsilon,
            num_groups=self.config.num_groups,
            norm_size=self.norm.group_size if gated else None,
            norm_before_gate=self.config.norm_before_gate,
            initial_conv=None if state is None else state.conv,
            initial_state=None if state is None else state.ssm,
            segments=segments,
            dt_limit=self.config.dt_limit,
            chunk_size=self.config.chunk_size,
            discretization=self.config.discretization,
            keep_projected=self.keep_projected,
            keep_convolved=self.keep_convolved,
            keep_cast=self.keep_cast,
        )
        return hidden, output, None if state is None else SSMState(conv, ssm)

    def _mix(self, zxBCdt: Tensor, state: SSMState | None, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = self.split(zxBCdt)
        xBC, conv = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if state is None else state.conv,
            segments=segments,
            return_final_state=True,
        )
        x, B, C = self.heads(xBC)
        y, ssm = ssd(
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.config.dt_limit,
            initial_state=None if state is None else state.ssm,
            segments=segments,
            return_final_state=True,
            chunk_size=self.config.chunk_size,
            discretization=self.config.discretization,
        )
        return self._gate(y, z), conv, ssm

    def split(self, zxBCdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of in_proj's output: [z|x|B|C|dt] = in_proj(hidden)  (arXiv 2405.21060, section 7.1).

        Args:
            zxBCdt: [.. d+c+h], for d inner channels, c = d + 2gn of the conv, and h heads.

        Returns:
            The gate z [.. d], what the conv is fed [.. c], and dt before its bias and softplus [.. h].
        """
        z, xBC, dt = zxBCdt.split([self.inner_size, self.inner_size + 2 * self.bc_size, self.num_heads], dim=-1)
        return z, xBC, dt

    def heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [.. h p], B [.. g n] and C [.. g n] out of the conv's channels [.. hp+2gn]."""
        x, B, C = xBC.split([self.inner_size, self.bc_size, self.bc_size], dim=-1)
        groups = (self.config.num_groups, self.config.state_size)
        return x.unflatten(-1, (self.num_heads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return self.norm(y, z) if self.config.gated_norm else y * F.silu(z)

    def _step(self, hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        z, xBC, dt = self.split(self.in_proj(hidden[:, 0]))
        xBC, conv = causal_conv1d_update(state.conv, xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        x, B, C = self.heads(xBC)
        y, ssm = ssd_state_update(
            state.ssm,
            x,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.config.dt_limit,
            discretization=self.config.discretization,
        )
        return self.out_proj(self._gate(y, z)).unsqueeze(1), SSMState(conv, ssm)

    def step_weights(self, norm: RMSNorm) -> Mamba2Weights:
        gated = self.config.gated_norm
        return Mamba2Weights(
            norm=norm.weight,
            norm_epsilon=norm.epsilon,
            in_proj=projection_of(self.in_proj),
            conv_weight=self.conv1d.weight.squeeze(1),
            conv_bias=self.conv1d.bias,
            dt_bias=self.dt_bias,
            A_log=self.A_log,
            D=self.D,
            state_size=self.config.state_size,
            gate_norm=self.norm.weight if gated else None,
            gate_norm_epsilon=self.norm_epsilon,
            gate_norm_size=self.norm.group_size if gated else self.inner_size,
            norm_before_gate=self.config.norm_before_gate,
            out_proj=projection_of(self.out_proj),
            dt_limit=self.config.dt_limit,
            discretization=self.config.discretization,
        )

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> SSMState:
        conv_size = self.inner_size + 2 * self.bc_size
        shape = (batch_size, self.num_heads, self.config.head_dim, self.config.state_size)
        return SSMState(
            torch.zeros(batch_size, self.config.conv_kernel - 1, conv_size, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )
