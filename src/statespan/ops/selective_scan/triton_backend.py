"""The selective scan on GPUs that the CUDA kernels do not serve: tensors to the kernels of `triton_kernels.py`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from statespan.ops.gpu import multiprocessors
from statespan.ops.layout import contiguous, contiguous_float32, last_contiguous, near
from statespan.ops.segments import token_marks
from statespan.ops.selective_scan import triton_kernels as kernels
from statespan.ops.selective_scan.inputs import Inputs, Options
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import start
from statespan.ops.tuning import Tunable

EVERY = 32  # tokens; the backward keeps the state before each EVERY-th token and computes the others again
PART_BYTES = 512 << 20  # of the sums over channels that programs leave to be added up, or as much as u has


def starts_shape(u: Tensor, A: Tensor, keep_starts: bool) -> tuple[int, ...]:
    """The shape [b chunks d n] of the states before each chunk; no chunks unless they are kept."""
    return (u.shape[0], -(-u.shape[1] // EVERY) if keep_starts else 0, *A.shape)


def _tile(values: int, group_channels: int, states: int) -> tuple[int, int, int]:
    """Channels and states of a tile, and warps: so many values each."""
    columns = power_of_two(states)
    tile = max(1, min(128, values // columns, power_of_two(group_channels)))
    return tile, columns, max(1, tile * columns // values)


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


def selective_scan(inputs: Inputs, options: Options, keep_starts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [b t d], the final state [b d n], and the states before each chunk."""
    u, A, initial_state, segments = inputs.u, inputs.A, inputs.initial_state, inputs.segments
    (batch, length, channels), (groups, states) = u.shape, inputs.B.shape[2:]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final_state = torch.empty(batch, *A.shape, dtype=torch.float32, device=u.device)
    starts = torch.empty(starts_shape(u, A, keep_starts), dtype=torch.float32, device=u.device)
    if final_state.numel() == 0:
        return y, final_state, starts
    u, dt, B, C = last_contiguous(u), last_contiguous(inputs.dt), near(inputs.B), near(inputs.C)
    z = last_contiguous(inputs.z)
    tuned = FORWARD.best(u.device, states)
    tile, columns, warps = _tile(tuned["tile"], channels // groups, states)
    with on(u.device):
        start(
            kernels.forward,
            (batch * groups * -(-(channels // groups) // tile),),
            *(u, dt, contiguous_float32(A), B, C, contiguous(inputs.D), z, contiguous(inputs.dt_bias)),
            contiguous_float32(initial_state),
            None if segments is None else token_marks(segments),
            *(y, final_state, starts, length, channels, states, channels // groups),
            *(*u.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3], *_strides(z, 2)),
            SOFTPLUS=options.dt_softplus,
            DISCRETIZATION=options.discretization,
            EVERY=EVERY if keep_starts else 0,
            UNROLL=tuned["unroll"],
            CHANNELS=tile,
            STATES=columns,
            num_warps=warps,
        )
    return y, final_state, starts


def gradients(
    grad_y: Tensor, grad_final: Tensor | None, starts: Tensor, inputs: Inputs, options: Options
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of inputs that are None mean nothing."""
    u, dt, A, B, C = inputs.u, inputs.dt, inputs.A, inputs.B, inputs.C
    D, z, dt_bias = inputs.D, inputs.z, inputs.dt_bias
    (batch, length, channels), (groups, states), segments = u.shape, B.shape[2:], inputs.segments
    new = partial(torch.empty, dtype=torch.float32, device=u.device)
    grad_u, grad_dt = (torch.empty(u.shape, dtype=x.dtype, device=u.device) for x in (u, dt))
    grad_z = None if z is None else torch.empty(u.shape, dtype=z.dtype, device=u.device)
    of_A, grad_initial, of_D, of_bias = new(batch, *A.shape), new(batch, *A.shape), *new(2, batch, channels)
    if starts.numel() == 0:
        others = (None if x is None else torch.zeros_like(x) for x in (A, B, C, D, z, dt_bias))
        return grad_u, grad_dt, *others, grad_initial
    grad_y, u, dt = (last_contiguous(value) for value in (grad_y, u, dt))
    B, C = near(B), near(C)
    z = last_contiguous(z)
    tuned = BACKWARD.best(u.device, states)
    tile, columns, warps = _tile(tuned["tile"], channels // groups, states)
    tiles, rows = -(-(channels // groups) // tile), batch * groups
    room = max(1, max(PART_BYTES, grad_u.nbytes) // (8 * rows * length * states))
    blocks = min(tiles, room, max(1, tuned["programs"] * multiprocessors(u.device) // rows))
    of_B, of_C = new(2, blocks, batch, length, groups, states)
    scratch = new(blocks * rows, EVERY, tile, columns)
    with on(u.device):
        start(
            kernels.backward,
            (blocks * rows,),
            *(grad_y, contiguous_float32(grad_final), starts),
            *(u, dt, contiguous_float32(A), B, C, contiguous(D), z, contiguous(dt_bias)),
            None if segments is None else token_marks(segments),
            *(scratch, grad_u, grad_dt, grad_z, of_A, of_D, of_bias, grad_initial, of_B, of_C),
            *(length, blocks, channels, states, channels // groups),
            *(*grad_y.stride()[:2], *u.stride()[:2], *dt.stride()[:2], *B.stride()[:3], *C.stride()[:3]),
            *_strides(z, 2),
            SOFTPLUS=options.dt_softplus,
            DISCRETIZATION=options.discretization,
            EVERY=EVERY,
            CHANNELS=tile,
            STATES=columns,
            num_warps=warps,
        )
    sums = of_A.sum(0), of_B.sum(0), of_C.sum(0), of_D.sum(0)
    return grad_u, grad_dt, *sums, grad_z, of_bias.sum(0), grad_initial


def _trial(backward: bool) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, states: int) -> Callable[[], object]:
        u, matrix = torch.randn(4, 1024, 2048, device=device), torch.randn(4, 1024, 1, states, device=device)
        A, D = -torch.rand(2048, states, device=device), torch.randn(2048, device=device)
        inputs, options = Inputs(u, u, A, matrix, matrix, D, u, D, None), Options(True, "mamba")
        *_, starts = selective_scan(inputs, options, True)
        if backward:
            return lambda: gradients(u, None, starts, inputs, options)
        return lambda: selective_scan(inputs, options, True)

    return trial


# States that a warp has in registers, tokens whose loads are in flight at once, programs on a multiprocessor.
FORWARD = Tunable("selective_scan.forward", (16, 128), _trial(False), tile=(256, 512), unroll=(2, 4, 8))
BACKWARD = Tunable("selective_scan.backward", (16, 128), _trial(True), tile=(256, 512), programs=(4, 8, 16))
TUNABLES = (FORWARD, BACKWARD)
