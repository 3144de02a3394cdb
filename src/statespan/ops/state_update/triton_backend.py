"""One-token updates on GPUs: tensors to the kernels of `triton_kernels.py`."""

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.ops.gpu import multiprocessors
from statespan.ops.layout import contiguous, last_contiguous
from statespan.ops.state_update import triton_kernels as kernels
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import launch
from statespan.ops.tuning import Tunable


def _tile(tunable: Tunable, batch: int, rows: int, states: int, device: torch.device) -> tuple[int, int, int]:
    """Rows and states of a tile, and warps: small tiles where there is little to do, so that all take part."""
    most = tunable.best(device, states)["tile"]
    columns = power_of_two(states)
    spread = batch * rows * columns // (4 * multiprocessors(device))
    values = max(256, min(most, power_of_two(spread)))
    tile = max(1, min(values // columns, power_of_two(rows)))
    return tile, columns, max(1, min(4, tile * columns // 512))


def selective_state_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    discretization: str,
) -> tuple[Tensor, Tensor]:
    """y and the next state of `statespan.ops.selective_state_update`."""
    batch, channels, states = state.shape
    y, next_state = u.new_empty(u.shape), torch.empty(state.shape, dtype=torch.float32, device=state.device)
    if next_state.numel() == 0:
        return y, next_state
    u, dt, B, C = (last_contiguous(value) for value in (u, dt, B, C))
    z = last_contiguous(z)
    tile, columns, warps = _tile(SELECTIVE, batch, channels, states, u.device)
    with on(u.device):
        launch(
            kernels.selective,
            (batch * -(-channels // tile),),
            state.contiguous(),
            u,
            dt,
            A.contiguous(),
            B,
            C,
            contiguous(D),
            z,
            contiguous(dt_bias),
            y,
            next_state,
            channels,
            states,
            channels // B.shape[1],
            u.stride(0),
            dt.stride(0),
            B.stride(0),
            B.stride(1),
            C.stride(0),
            C.stride(1),
            0 if z is None else z.stride(0),
            DT_SOFTPLUS=dt_softplus,
            DISCRETIZATION=discretization,
            CHANNELS=tile,
            STATES=columns,
            num_warps=warps,
        )
    return y, next_state


def ssd_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    discretization: str,
) -> tuple[Tensor, Tensor]:
    """y and the next state of `statespan.ops.ssd_state_update`."""
    batch, heads, head_dim, states = state.shape
    y, next_state = x.new_empty(x.shape), torch.empty(state.shape, dtype=torch.float32, device=state.device)
    if next_state.numel() == 0:
        return y, next_state
    x, dt, B, C = (last_contiguous(value) for value in (x, dt, B, C))
    tile, columns, warps = _tile(SSD, batch * heads, head_dim, states, x.device)
    with on(x.device):
        launch(
            kernels.ssd,
            (batch * heads * -(-head_dim // tile),),
            state.contiguous(),
            x,
            dt,
            A.contiguous(),
            B,
            C,
            D,
            contiguous(dt_bias),
            y,
            next_state,
            heads,
            head_dim,
            states,
            heads // B.shape[1],
            x.stride(0),
            x.stride(1),
            dt.stride(0),
            B.stride(0),
            B.stride(1),
            C.stride(0),
            C.stride(1),
            0 if D is None else D.stride(0),
            0 if D is None or D.dim() == 1 else D.stride(1),
            *dt_limit,
            DT_SOFTPLUS=dt_softplus,
            DISCRETIZATION=discretization,
            DIMS=tile,
            STATES=columns,
            num_warps=warps,
        )
    return y, next_state


def _selective_trial(device: torch.device, states: int) -> Callable[[], object]:
    u, B = torch.randn(64, 5120, device=device), torch.randn(64, 1, states, device=device)
    state, A, D = torch.randn(64, 5120, states, device=device), -torch.rand(5120, states, device=device), u[0]
    return lambda: selective_state_update(state, u, u, A, B, B, D, u, D, True, "mamba")


def _ssd_trial(device: torch.device, states: int) -> Callable[[], object]:
    x, B = torch.randn(64, 80, 64, device=device), torch.randn(64, 1, states, device=device)
    state, dt, A = (
        torch.randn(64, 80, 64, states, device=device),
        x[..., 0].contiguous(),
        -torch.rand(80, device=device),
    )
    return lambda: ssd_state_update(state, x, dt, A, B, B, A, A, True, (0.0, float("inf")), "mamba")


_TILES = (512, 1024, 2048, 4096)  # state values of a program; 1024 have 2 warps
SELECTIVE = Tunable("selective_state_update", (16, 64), _selective_trial, tile=_TILES)
SSD = Tunable("ssd_state_update", (64, 128), _ssd_trial, tile=_TILES)
TUNABLES = (SELECTIVE, SSD)
