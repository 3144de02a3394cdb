"""S4, S4D and LSSL: the linear time-invariant mixers, trained as convolutions and stepped as recurrences."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from statespan.layers.config import LSSLConfig, LTIConfig, S4Config, S4DConfig
from statespan.layers.ssm_block import SSMBlock
from statespan.ops.lti import DplrSystem, System, discretize, hippo_matrices, lti_scan


class LTIMixer(SSMBlock):
    """A block round a time-invariant system, which trains as a convolution and steps as a recurrence."""

    def __init__(self, hidden_size: int, config: LTIConfig) -> None:
        super().__init__(hidden_size, config)
        self.config = config
        self.log_dt = nn.Parameter(torch.zeros(self.inner_size))
        self.D = nn.Parameter(torch.ones(self.inner_size))

    @abstractmethod
    def system(self) -> System | DplrSystem:
        """The discrete state-space model of the parameters as they are."""

    def state_space(self, u: Tensor, state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(u.device.type, enabled=False):
            return self._state_space(u, state, segments)

    def _state_space(self, u: Tensor, state: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor | None]:
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
