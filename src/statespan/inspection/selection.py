"""What a text makes of a Mamba layer's recurrence: its step sizes, its memory, and the attention that it implies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.s6 import S6
from statespan.ops import causal_conv1d
from statespan.ops.state_update.reference import discretize, step_size


@dataclass(frozen=True)
class Selection:
    """The recurrence h_t = Abar_t h_{t-1} + Bbar_t u_t,  y_t = C_t h_t + D u_t  of one layer over one text.

    A channel c is one of Mamba-1 or S6, with p = 1 input and m = n decay rates, or a head of Mamba-2, with p = head_dim
    inputs that share everything and m = 1 decay rate. All tensors are float64 on the CPU.
    """

    u: Tensor  # [t c p]
    dt: Tensor  # [t c], the step size as the recurrence uses it: after bias, softplus and limits
    A: Tensor  # [c m], below 0
    B: Tensor  # [t g n], g divides c
    C: Tensor  # [t g n]
    D: Tensor  # [c]
    discretization: str

    @property
    def num_channels(self) -> int:
        """Channels of Mamba-1 and S6, heads of Mamba-2."""
        return self.A.shape[0]

    def log_decay(self) -> Tensor:
        """log |Abar|, [t c m]: what a token leaves of the state."""
        step = self.dt.unsqueeze(-1) * self.A
        if self.discretization == "bilinear":
            return discretize(self.dt.unsqueeze(-1), self.A, "bilinear")[0].abs().log()
        return step


def selection_of(mixer: Mamba1 | Mamba2 | S6, hidden: Tensor) -> Selection:
    """What a mixer selects for the text that it reads, by its own projections and conv.

    Args:
        mixer: of any dtype and device.
        hidden: [1 t h], what it reads, such as `Observation.mixer_inputs` holds.
    Returns:
        The recurrence in float64 on the CPU.
    """
    with torch.inference_mode():
        if isinstance(mixer, Mamba2):
            _, xBC, dt = mixer.split(mixer.in_proj(hidden))
            u, B, C = mixer.heads(_convolved(mixer, xBC))
            A, limit = -torch.exp(_exact(mixer.A_log)).unsqueeze(-1), mixer.config.dt_limit
        else:
            if isinstance(mixer, S6):
                x, _, _ = mixer.enter(hidden, None, None)
                dt, B, C = mixer.selection(x)
            else:
                x = _convolved(mixer, mixer.in_proj(hidden).chunk(2, dim=-1)[0])
                dt, B, C = mixer.selection(x)
            u, B, C = x.unsqueeze(-1), B.unsqueeze(2), C.unsqueeze(2)
            A, limit = -torch.exp(_exact(mixer.A_log)), None
        dt = step_size(_exact(dt[0]), _exact(mixer.dt_bias), dt_softplus=True, dt_limit=limit)
        u, B, C, D = (_exact(x) for x in (u[0], B[0], C[0], mixer.D))
    discretization = "mamba" if isinstance(mixer, S6) else mixer.config.discretization
    return Selection(u, dt, A, B, C, D, discretization)


def memory_lengths(selection: Selection) -> Tensor:
    """How many tokens of this text a state lasts: 1 / mean_t(-log |Abar_t|).

    After so many tokens with the text's mean decay 1/e of a state is left.

    Args:
        selection: of one layer and text.
    Returns:
        [c m] float64, tokens; Mamba-1 has one figure for each state of a channel, Mamba-2 one for each head.
    """
    return -1 / selection.log_decay().mean(0)


def hidden_attention(selection: Selection, channels: Sequence[int]) -> Tensor:
    """The lower triangular matrix that a selective SSM multiplies its input by (arXiv 2403.01590, eq. 10).

    alpha_ts = C_t (prod_{k=s+1..t} Abar_k) Bbar_s: y_t = sum_s alpha_ts u_s + D u_t is the scan's output.

    Args:
        selection: of one layer and text.
        channels: which channels (Mamba-1) or heads (Mamba-2), c of them.
    Returns:
        [c t s] float64; zero where s > t.
    Numerics: the products are formed by the recurrence itself, a token at a time, so no decay is too small or negative.
    """
    chosen = torch.as_tensor(channels, dtype=torch.int64)
    group = chosen // (selection.num_channels // selection.B.shape[1])
    dt, A = selection.dt[:, chosen].unsqueeze(-1), selection.A[chosen]
    Abar, scale = discretize(dt, A, selection.discretization)  # [t c m]
    B, C = selection.B[:, group], selection.C[:, group]  # [t c n]
    shared = A.shape[1] == 1  # all states of a head share one decay: it is followed alone, and C_t B_s come after it
    entering = scale if shared else scale * B
    length = len(dt)
    alpha = torch.zeros(len(chosen), length, length, dtype=torch.float64)
    left = torch.zeros(len(chosen), length, entering.shape[2], dtype=torch.float64)  # [c s m], of Bbar_s up to t
    for t in range(length):
        left[:, :t] *= Abar[t].unsqueeze(1)
        left[:, t] = entering[t]
        past = left[:, : t + 1]
        alpha[:, t, : t + 1] = past.squeeze(2) if shared else (past @ C[t].unsqueeze(2)).squeeze(2)
    if shared:
        alpha *= torch.einsum("tcn,scn->cts", C, B)
    return alpha


def _convolved(mixer: Mamba1 | Mamba2, x: Tensor) -> Tensor:
    return causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)


def _exact(x: Tensor) -> Tensor:
    return x.detach().cpu().double()
