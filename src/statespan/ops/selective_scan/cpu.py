"""The selective scan on the CPU: hands tensors to the Numba kernels of `cpu_forward.py` and `cpu_backward.py`."""

import math
from typing import Any

import torch
from torch import Tensor

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.layout import contiguous_float32, last_contiguous
from statespan.ops.numba_kernels import Kernel, num_workers, scratch
from statespan.ops.numba_kernels.host import vector_width
from statespan.ops.segments import token_marks
from statespan.ops.selective_scan.inputs import Inputs, Options

CHUNK = 32  # steps; the backward keeps the state before each chunk and computes the others again
TILE_STATES = 4  # states of a channel that the backward handles at a time
MAX_BLOCK = 8  # vectors of channels in a work item

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


def starts_shape(u: Tensor, A: Tensor, keep_starts: bool) -> tuple[int, ...]:
    """The shape [b chunks n d] of the states before each chunk; no chunks unless they are kept."""
    return (u.shape[0], -(-u.shape[1] // CHUNK) if keep_starts else 0, A.shape[1], A.shape[0])


def selective_scan(inputs: Inputs, options: Options, keep_starts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [b t d], the final state [b d n], and the states before each chunk."""
    arguments, u, A, initial_state = _arguments(inputs, options), inputs.u, inputs.A, inputs.initial_state
    padded, block = arguments["padded"], arguments["block"]
    items = u.shape[0] * arguments["groups"] * arguments["blocks"]
    workers = num_workers(items)
    memory = scratch(workers, (3 * CHUNK + 2 * block * padded) * vector_width() + 2 * CHUNK * padded)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = torch.empty(u.shape[0], A.shape[1], u.shape[2], dtype=torch.float32)
    starts = torch.empty(starts_shape(u, A, keep_starts), dtype=torch.float32)
    _forward(
        items,
        workers=workers,
        **arguments,
        memory=memory,
        memory_row=memory.shape[1],
        initial=None if initial_state is None else initial_state.float().transpose(1, 2).contiguous(),
        y=y,
        y_bf16=y.dtype == torch.bfloat16,
        final=final,
        starts=starts if keep_starts else None,
    )
    return y, final.transpose(1, 2).contiguous(), starts


def gradients(
    grad_y: Tensor, grad_final: Tensor | None, starts: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of inputs that are None mean nothing."""
    arguments, u, dt, z = _arguments(inputs, options), inputs.u, inputs.dt, inputs.z
    (batch, length, channels), states = u.shape, inputs.A.shape[1]
    groups, padded, block, blocks = (arguments[name] for name in ("groups", "padded", "block", "blocks"))
    items = batch * groups * blocks
    workers = num_workers(items)
    vectors = 8 * CHUNK * block + (2 * CHUNK + 2) * TILE_STATES + 2 * CHUNK * (padded + 1) + (3 * padded + 2) * block
    memory = scratch(workers, vectors * vector_width() + 2 * CHUNK * padded)
    grad_u, grad_dt = torch.empty(u.shape, dtype=u.dtype), torch.empty(u.shape, dtype=dt.dtype)
    grad_z = torch.empty(0) if z is None else torch.empty(u.shape, dtype=z.dtype)
    of_states = torch.empty(2, batch, states, channels, dtype=torch.float32)
    of_matrices = torch.empty(2, batch, blocks, length, groups, states, dtype=torch.float32)
    of_channels = torch.empty(2, batch, channels, dtype=torch.float32)
    _backward(
        items,
        workers=workers,
        **arguments,
        memory=memory,
        memory_row=memory.shape[1],
        **_rows("g", last_contiguous(grad_y)),
        grad_final=None if grad_final is None else grad_final.transpose(1, 2).contiguous(),
        starts=starts,
        grad_u=grad_u,
        grad_dt=grad_dt,
        grad_z=grad_z,
        grad_A=of_states[0],
        grad_B=of_matrices[0],
        grad_C=of_matrices[1],
        grad_D=of_channels[0],
        grad_bias=of_channels[1],
        grad_initial=of_states[1],
    )
    grad_A, grad_initial = of_states[0].sum(0).t().contiguous(), of_states[1].transpose(1, 2).contiguous()
    grad_B, grad_C = of_matrices[0].sum(1), of_matrices[1].sum(1)
    grad_D, grad_bias = of_channels[0].sum(0), of_channels[1].sum(0)
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial


def _arguments(inputs: Inputs, options: Options) -> dict[str, Any]:
    """The kernels' arguments _INPUTS."""
    u, A, B, segments = inputs.u, inputs.A, inputs.B, inputs.segments
    channels, groups, width = u.shape[2], B.shape[2], vector_width()
    vectors = -(-(channels // groups) // width)  # of a group
    # As many items as keep the threads evenly busy, and no more: wide ones read memory faster and have fewer sums.
    block = u.shape[0] * groups * vectors // (4 * torch.get_num_threads())
    block = max(1, min(block, vectors, MAX_BLOCK))
    return {
        **_rows("u", last_contiguous(u)),
        **_rows("dt", last_contiguous(inputs.dt)),
        **_rows("z", last_contiguous(inputs.z)),
        **_matrix("B", last_contiguous(B)),
        **_matrix("C", last_contiguous(inputs.C)),
        "A": (A.float() * (1 / math.log(2))).t().contiguous(),
        "D": contiguous_float32(inputs.D),
        "dt_bias": contiguous_float32(inputs.dt_bias),
        "marks": None if segments is None else token_marks(segments),
        "length": u.shape[1],
        "channels": channels,
        "groups": groups,
        "num_states": A.shape[1],
        "padded": -(-A.shape[1] // width) * width,
        "block": block,
        "blocks": -(-vectors // block),
        "dt_softplus": options.dt_softplus,
        "discretization": DISCRETIZATIONS[options.discretization],
    }


def _rows(name: str, tensor: Tensor | None) -> dict[str, Any]:
    """The arguments that describe a [b t d] tensor."""
    if tensor is None:
        return {name: None, f"{name}_b": 0, f"{name}_t": 0, f"{name}_bf16": 0}
    bf16 = tensor.dtype == torch.bfloat16
    return {name: tensor, f"{name}_b": tensor.stride(0), f"{name}_t": tensor.stride(1), f"{name}_bf16": bf16}


def _matrix(name: str, tensor: Tensor) -> dict[str, Any]:
    """The arguments that describe a [b t g n] tensor."""
    return {**_rows(name, tensor), f"{name}_g": tensor.stride(2)}
