"""One-token updates on the CPU: tensors to the kernels of `cpu_kernels.py`."""

import torch
from torch import Tensor

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.layout import contiguous_float32, last_contiguous
from statespan.ops.numba_kernels import Kernel, num_workers

_MODULE = "statespan.ops.state_update.cpu_kernels"
_selective = Kernel(
    _MODULE,
    "selective_state_update",
    "state u dt A B C D z dt_bias y next_state channels states groups channels_per_item u_stride dt_stride"
    " B_stride B_group_stride C_stride C_group_stride z_stride u_bf16 dt_bf16 B_bf16 C_bf16 z_bf16 dt_softplus"
    " discretization",
)
_ssd = Kernel(
    _MODULE,
    "ssd_state_update",
    "state x dt A B C D dt_bias y next_state heads head_dim states groups x_stride dt_stride B_stride B_group_stride"
    " C_stride C_group_stride D_stride D_dim_stride x_bf16 dt_bf16 B_bf16 C_bf16 dt_softplus discretization",
    "dt_min dt_max",
)

BF16 = torch.bfloat16
CHANNELS_PER_ITEM = 256
ALONE = 1 << 14  # state values that one thread has updated before another is awake


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


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
    state, A, u, dt, B, C = (
        contiguous_float32(state),
        contiguous_float32(A),
        last_contiguous(u),
        last_contiguous(dt),
        last_contiguous(B),
        last_contiguous(C),
    )
    D = contiguous_float32(D)
    dt_bias = contiguous_float32(dt_bias)
    z = last_contiguous(z)
    y, next_state = u.new_empty(u.shape), torch.empty_like(state)
    num_items = batch * ((channels + CHANNELS_PER_ITEM - 1) // CHANNELS_PER_ITEM)
    workers = 1 if state.numel() < ALONE else num_workers(num_items)
    _selective.launch(
        num_items,
        workers,
        state.data_ptr(),
        u.data_ptr(),
        dt.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        _address(D),
        _address(z),
        _address(dt_bias),
        y.data_ptr(),
        next_state.data_ptr(),
        channels,
        states,
        B.shape[1],
        CHANNELS_PER_ITEM,
        u.stride(0),
        dt.stride(0),
        B.stride(0),
        B.stride(1),
        C.stride(0),
        C.stride(1),
        0 if z is None else z.stride(0),
        u.dtype is BF16,
        dt.dtype is BF16,
        B.dtype is BF16,
        C.dtype is BF16,
        z is not None and z.dtype is BF16,
        dt_softplus,
        DISCRETIZATIONS[discretization],
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
    state, A, dt, B, C = (
        contiguous_float32(state),
        contiguous_float32(A),
        last_contiguous(dt),
        last_contiguous(B),
        last_contiguous(C),
    )
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    D = contiguous_float32(D)
    dt_bias = contiguous_float32(dt_bias)
    y, next_state = x.new_empty(x.shape), torch.empty_like(state)
    workers = 1 if state.numel() < ALONE else num_workers(batch * heads)
    _ssd.launch(
        batch * heads,
        workers,
        state.data_ptr(),
        x.data_ptr(),
        dt.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        C.data_ptr(),
        _address(D),
        _address(dt_bias),
        y.data_ptr(),
        next_state.data_ptr(),
        heads,
        head_dim,
        states,
        B.shape[1],
        x.stride(0),
        dt.stride(0),
        B.stride(0),
        B.stride(1),
        C.stride(0),
        C.stride(1),
        0 if D is None else D.stride(0),
        0 if D is None or D.dim() == 1 else 1,
        x.dtype is BF16,
        dt.dtype is BF16,
        B.dtype is BF16,
        C.dtype is BF16,
        dt_softplus,
        DISCRETIZATIONS[discretization],
        *dt_limit,
    )
    return y, next_state
