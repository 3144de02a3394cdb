"""S4, S4D and LSSL: the linear time-invariant mixers, trained as convolutions and stepped as recurrences."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, glu, silu

from statespan.layers.config import LSSLConfig, LTIConfig, S4Config, S4DConfig
from statespan.layers.linear import Linear
from statespan.layers.mixer import Mixer
from statespan.layers.state import LTIState
from statespan.ops import causal_conv1d
from statespan.ops.lti import DplrSystem, System, discretize, hippo_matrices, lti_scan

GATED = {"h3": 3, "mamba": 2}  # blocks with an in_proj and a conv, and how many channels it makes of one


class LTIMixer(Mixer):
    """A block round y = SSM(u), one state-space model with N states a channel; LTIConfig.block says which.

    The state holds the newest inputs of the conv, where the block has one, and the SSM's state [b d n] in real numbers:
    real and imaginary parts in turns where it is complex.
    """

    def __init__(self, hidden_size: int, config: LTIConfig) -> None:
        super().__init__()
        self.config = config
        self.block, self.conv_kernel = config.block, config.conv_kernel
        self.inner_size, self.state_size = config.inner_size(hidden_size), config.state_size
        if self.block in GATED:
            self.in_proj = Linear(hidden_size, GATED[self.block] * self.inner_size, bias=config.proj_bias)
            self.conv1d = nn.Conv1d(self.inner_size, self.inner_size, self.conv_kernel, groups=self.inner_size)
        self.log_dt = nn.Parameter(torch.zeros(self.inner_size))
        self.D = nn.Parameter(torch.ones(self.inner_size))
        out_size = 2 * hidden_size if self.block == "glu" else hidden_size
        self.out_proj = Linear(self.inner_size, out_size, bias=config.proj_bias)

    @abstractmethod
    def system(self) -> System | DplrSystem:
        """The discrete state-space model of the parameters as they are."""

    def forward(
        self, hidden: Tensor, state: LTIState | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, LTIState | None]:
        u, gate, conv = self._enter(hidden, state, segments)
        with torch.autocast(hidden.device.type, enabled=False):
            y, ssm = self._state_space(u, None if state is None else state.ssm, segments)
        out = self._leave(y.to(u.dtype), gate)
        return out, None if state is None else LTIState(conv, ssm)

    def _enter(self, hidden: Tensor, state: LTIState | None, segments: Tensor | None) -> tuple[Any, ...]:
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

    def _state_space(self, u: Tensor, state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Any]:
        system = self.system()
        before = state if state is None or not system.B.is_complex() else _to_complex(state)
        if before is None:
            return lti_scan(u, system, self.D, segments=segments), None
        if u.shape[1] == 1 and segments is None:
            token = u.squeeze(1).to(self.D.dtype)
            y, after = system.step(before, token)
            y = (y + self.D * token).unsqueeze(1)
        else:
            y, after = lti_scan(u, system, self.D, initial_state=before, segments=segments, return_final_state=True)
        return y, torch.view_as_real(after).flatten(-2) if after.is_complex() else after

    def new_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> LTIState:
        taps = self.conv_kernel - 1 if self.block in GATED else 0
        ssm_dtype = torch.promote_types(dtype, torch.float32)
        return LTIState(
            torch.zeros(batch_size, taps, self.inner_size, device=device, dtype=dtype),
            torch.zeros(batch_size, self.inner_size, self.state_size, device=device, dtype=ssm_dtype),
        )


class S4(LTIMixer):
    """y = SSM(u) with A = diag(L) - P^T conj(P), Re L < 0, stepped with the bilinear form (arXiv 2111.00396).

    One low-rank factor stands on both sides, so that A stays stable however it is trained (arXiv 2202.09729, 4.1).
    """

    float32_parameters = ("log_dt", "D", "log_A_real", "A_imag", "P", "B", "C")

    def __init__(self, hidden_size: int, config: S4Config) -> None:
        super().__init__(hidden_size, config)
        pairs = (self.inner_size, config.state_size // 2)
        self.log_A_real, self.A_imag = (nn.Parameter(torch.zeros(pairs)) for _ in range(2))
        self.P, self.B, self.C = (nn.Parameter(torch.zeros(*pairs, 2)) for _ in range(3))  # real, imaginary

    def system(self) -> DplrSystem:
        eigenvalues = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        P, B, C = (torch.view_as_complex(x) for x in (self.P, self.B, self.C))
        return DplrSystem(eigenvalues, P.unsqueeze(0), B, C, torch.exp(self.log_dt))


class S4D(LTIMixer):
    """y = SSM(u) with A = diag(L), Re L < 0, and B = 1: only the product of B and C counts (arXiv 2206.11893, 3.3)."""

    def __init__(self, hidden_size: int, config: S4DConfig) -> None:
        super().__init__(hidden_size, config)
        self.init, self.discretization = config.init, config.discretization
        real = config.init == "real"
        states = (self.inner_size, config.state_size if real else config.state_size // 2)
        self.log_A_real = nn.Parameter(torch.zeros(states))
        self.A_imag = None if real else nn.Parameter(torch.zeros(states))
        self.C = nn.Parameter(torch.zeros(states if real else (*states, 2)))  # real, imaginary
        self.float32_parameters = ("log_dt", "D", "log_A_real", "C", *(() if real else ("A_imag",)))

    def system(self) -> System:
        A, C = -torch.exp(self.log_A_real), self.C
        if self.A_imag is not None:
            A, C = torch.complex(A, self.A_imag), torch.view_as_complex(C)
        return System(*discretize(A, torch.ones_like(A), torch.exp(self.log_dt), self.discretization), C)


class LSSL(LTIMixer):
    """y = SSM(u) with the dense A and B of a HiPPO measure, which are not trained (arXiv 2110.13985, LSSL-fixed)."""

    float32_parameters = ("log_dt", "D", "C")

    def __init__(self, hidden_size: int, config: LSSLConfig) -> None:
        super().__init__(hidden_size, config)
        self.measure, self.discretization = config.measure, config.discretization
        self.C = nn.Parameter(torch.zeros(self.inner_size, config.state_size))

    def system(self) -> System:
        channels, states = self.C.shape
        A, B = (x.to(self.C) for x in hippo_matrices(self.measure, states))
        dt = torch.exp(self.log_dt)
        A, B = A.expand(channels, states, states), B.expand(channels, states)
        return System(*discretize(A, B, dt, self.discretization), self.C)


def _to_complex(state: Tensor) -> Tensor:
    return torch.view_as_complex(state.unflatten(-1, (-1, 2)))
