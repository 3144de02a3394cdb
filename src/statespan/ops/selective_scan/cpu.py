"""The selective scan on the CPU: hands tensors to the Numba kernels of `cpu_forward.py` and `cpu_backward.py`."""

import math
from typing import Any

import torch
from torch import Tensor

from statespan.ops.numba_kernels import Kernel, num_workers, scratch
from statespan.ops.numba_kernels.host import vector_width
from statespan.ops.segments import token_marks

CHUNK = 32  # steps; the backward keeps the state before each chunk and computes the others again
TILE_STATES = 4  # states that the backward handles at a time
MAX_BLOCK = 8  # vectors of channels in a work item
DISCRETIZATIONS = {"mamba": 0, "zoh": 1, "bilinear": 2}

_INPUTS = (
    "u u_b u_t u_bf16 dt dt_b dt_t dt_bf16 z z_b z_t z_bf16 B B_b B_t B_g B_bf16 C C_b C_t C_g C_bf16 "
    "A D dt_bias marks length channels groups num_states padded block blocks dt_softplus discretization "
)
_FOLDER = "statespan.ops.selective_scan"
_forward = Kernel(f"{_FOLDER}.cpu_forward", "forward", _INPUTS + "memory memory_row initial y y_bf16 final starts")
_backward = Kernel(
    f"{_FOLDER}.cpu_backward",
    "backward",
    _INPUTS + "memory memory_row g g_b g_t g_bf16 grad_final starts "
    "grad_u grad_dt grad_z grad_A grad_B grad_C grad_D grad_bias grad_initial",
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    dt_softplus: bool,
    discretization: str,
    keep_starts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [b t d], the final state [b d n], and with keep_starts the states before each chunk [b chunks n d]."""
    batch, length, channels = u.shape
    states, width = A.shape[1], vector_width()
    inputs = _inputs(u, dt, A, B, C, D, z, dt_bias, segments, dt_softplus, discretization)
    items = batch * inputs["groups"] * inputs["blocks"]
    workers = num_workers(items)
    padded = inputs["padded"]
    memory = scratch(workers, (3 * CHUNK + 2 * inputs["block"] * padded) * width + 2 * CHUNK * padded)
    y = torch.empty_like(u, dtype=inputs["u"].dtype, memory_format=torch.contiguous_format)
    final = y.new_empty(batch, states, channels, dtype=torch.float32)
    chunks = -(-length // CHUNK) if keep_starts else 0
    starts = final.new_empty(batch, chunks, states, channels)
    _forward(
        items,
        workers=workers,
        **inputs,
        memory=memory,
        memory_row=memory.shape[1],
        initial=None if initial_state is None else initial_state.float().transpose(1, 2).contiguous(),
        y=y,
        y_bf16=y.dtype == torch.bfloat16,
        final=final,
        starts=starts if keep_starts else None,
    )
    return y.to(u.dtype), final.transpose(1, 2).contiguous(), starts


def gradients(
    grad_y: Tensor,
    grad_final: Tensor | None,
    starts: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    segments: Tensor | None,
    dt_softplus: bool,
    discretization: str,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of absent inputs mean nothing.

    The same inputs give the same bits: sums over channels and rows are formed in a fixed order.
    """
    batch, length, channels = u.shape
    states, width = A.shape[1], vector_width()
    inputs = _inputs(u, dt, A, B, C, D, z, dt_bias, segments, dt_softplus, discretization)
    groups, block, blocks = inputs["groups"], inputs["block"], inputs["blocks"]
    items = batch * groups * blocks
    workers = num_workers(items)
    padded = inputs["padded"]
    vectors = 8 * CHUNK * block + (2 * CHUNK + 2) * TILE_STATES + 2 * CHUNK * (padded + 1) + (3 * padded + 2) * block
    memory = scratch(workers, vectors * width + 2 * CHUNK * padded)
    grad_u, grad_dt, grad_z = (
        torch.empty(u.shape, dtype=inputs[name].dtype) for name in ("u", "dt", "z" if z is not None else "u")
    )
    by_state = torch.empty(2, batch, states, channels)
    by_matrix = torch.empty(2, batch, blocks, length, groups, states)
    by_channel = torch.empty(2, batch, channels)
    _backward(
        items,
        workers=workers,
        **inputs,
        memory=memory,
        memory_row=memory.shape[1],
        **_rows("g", _readable(grad_y)),
        grad_final=None if grad_final is None else grad_final.float().transpose(1, 2).contiguous(),
        starts=starts,
        grad_u=grad_u,
        grad_dt=grad_dt,
        grad_z=None if z is None else grad_z,
        grad_A=by_state[0],
        grad_B=by_matrix[0],
        grad_C=by_matrix[1],
        grad_D=by_channel[0],
        grad_bias=by_channel[1],
        grad_initial=by_state[1],
    )
    grad_A, grad_initial = by_state[0].sum(0).t().contiguous(), by_state[1].transpose(1, 2).contiguous()
    grad_B, grad_C = by_matrix.sum(2)
    grad_D, grad_bias = by_channel.sum(1)
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial


def _inputs(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    segments: Tensor | None,
    dt_softplus: bool,
    discretization: str,
) -> dict[str, Any]:
    """The kernels' arguments _INPUTS."""
    channels, groups = u.shape[2], B.shape[2]
    vectors = -(-channels // groups // vector_width())  # of a group
    # Enough items to keep the threads even, each as wide as possible: wide rows are read at memory speed.
    block = max(1, min(MAX_BLOCK, u.shape[0] * groups * vectors // (4 * torch.get_num_threads()), vectors))
    return {
        **_rows("u", _readable(u)),
        **_rows("dt", _readable(dt)),
        **_rows("z", None if z is None else _readable(z)),
        **_matrix("B", _readable(B)),
        **_matrix("C", _readable(C)),
        "A": (A.float() * (1 / math.log(2))).t().contiguous(),
        "D": None if D is None else D.float().contiguous(),
        "dt_bias": None if dt_bias is None else dt_bias.float().contiguous(),
        "marks": None if segments is None else token_marks(segments),
        "length": u.shape[1],
        "channels": channels,
        "groups": groups,
        "num_states": A.shape[1],
        "padded": -(-A.shape[1] // vector_width()) * vector_width(),
        "block": block,
        "blocks": -(-vectors // block),
        "dt_softplus": dt_softplus,
        "discretization": DISCRETIZATIONS[discretization],
    }


def _readable(tensor: Tensor) -> Tensor:
    """The tensor in float32 or bfloat16, the last dimension contiguous."""
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(name: str, tensor: Tensor | None) -> dict[str, Any]:
    """The arguments that describe a [b t d] tensor."""
    if tensor is None:
        return {name: None, f"{name}_b": 0, f"{name}_t": 0, f"{name}_bf16": 0}
    bf16 = tensor.dtype == torch.bfloat16
    return {name: tensor, f"{name}_b": tensor.stride(0), f"{name}_t": tensor.stride(1), f"{name}_bf16": bf16}


def _matrix(name: str, tensor: Tensor) -> dict[str, Any]:
    """The arguments that describe a [b t g n] tensor."""
    return {**_rows(name, tensor), f"{name}_g": tensor.stride(2)}
