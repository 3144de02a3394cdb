"""The selective scan on NVIDIA GPUs: the tensors of a call, and scratch memory, for the kernels of the `.cu` files.

docs/kernels.md has the design and what was measured; `cuda_plan.py` divides the work.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from statespan.ops.cuda_kernels import address
from statespan.ops.layout import contiguous_float32, last_contiguous
from statespan.ops.segments import kernel_marks
from statespan.ops.selective_scan.cuda_plan import EVERY, PIECE, Layout, Scan, scan_of
from statespan.ops.selective_scan.inputs import Inputs, Options


def starts_shape(u: Tensor, A: Tensor, keep_starts: bool) -> tuple[int, ...]:
    """The shape [b chunks d n] of the states before each chunk; no chunks unless they are kept."""
    return (u.shape[0], -(-u.shape[1] // EVERY) if keep_starts else 0, *A.shape)


def selective_scan(inputs: Inputs, options: Options, keep_starts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [b t d], the final state [b d n], and the states before each chunk."""
    arguments, u, A = Arguments(inputs, options), inputs.u, inputs.A
    scan = scan_of(arguments.layout)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final = torch.empty((scan.batch, *A.shape), dtype=torch.float32, device=u.device)
    starts = torch.empty(starts_shape(u, A, keep_starts), dtype=torch.float32, device=u.device)
    if final.numel() == 0:
        return y, final, starts
    launch, split = scan.forward(keep_starts)
    given = contiguous_float32(inputs.initial_state)
    if split < scan.length:
        given = _chain(scan, arguments, given, split, None)
    outputs = (address(given), address(y), address(final), address(starts))
    launch(*arguments.all, *outputs, split, *scan.sizes)
    return y, final, starts


def gradients(
    grad_y: Tensor,
    grad_final: Tensor | None,
    starts: Tensor,
    inputs: Inputs,
    options: Options,
    into_z: Tensor | None = None,
    into_y: Tensor | None = None,
    into_matrices: tuple[Tensor, Tensor] | None = None,
    of_log: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of inputs that are None mean nothing.

    That of z is written to `into_z`, where it is given; its rows may be strided. With z, `into_y` [b t d] gets the
    scan's output once more. Those of B and C, of one group, are written to `into_matrices`, where they are given: they
    lie as B and C do. With `of_log` that of A is that of log(-A).
    """
    u, dt, A, B, C = inputs.u, inputs.dt, inputs.A, inputs.B, inputs.C
    D, z, dt_bias = inputs.D, inputs.z, inputs.dt_bias
    grad_y = _rows(grad_y if grad_y.dtype is u.dtype else grad_y.to(u.dtype))
    grad_z = into_z
    if z is not None and into_z is None:
        grad_z = torch.empty(u.shape, dtype=z.dtype, device=u.device)
    arguments = Arguments(inputs, options, [grad_y] if grad_z is None else [grad_y, grad_z])
    scan = scan_of(arguments.layout)
    new = partial(torch.empty, dtype=torch.float32, device=u.device)
    grad_u, grad_dt = (torch.empty(u.shape, dtype=x.dtype, device=u.device) for x in (u, dt))
    of_z = (0, 0, 0) if grad_z is None else (address(grad_z), *grad_z.stride()[:2])
    grad_initial = new((scan.batch, *A.shape))
    if starts.numel() == 0:
        of_A, *others = (None if x is None else torch.zeros_like(x) for x in (A, B, C, D, dt_bias))
        return grad_u, grad_dt, of_A, *others[:3], None if grad_z is None else grad_z.zero_(), others[3], grad_initial
    work = scan.backward()
    carries = contiguous_float32(grad_final)
    passed = progress = None
    if work.chained:
        passed = new((scan.batch, *A.shape))
        progress = torch.zeros(work.blocks * scan.groups * scan.batch, dtype=torch.int32, device=u.device)
    elif work.splits > 1:
        carries = _chain(scan, arguments, carries, work.split, grad_y)
    of_matrices = new((work.blocks, 2, *B.shape))
    of_A, of_channels = new((scan.batch, work.splits, *A.shape)), new((2, scan.batch, work.splits, scan.channels))
    of_D = address(of_channels)
    work.main(
        *(*arguments.all, address(grad_y), *grad_y.stride()[:2], address(starts), address(carries)),
        *(address(grad_u), address(grad_dt), *of_z, address(into_y)),
        *(address(of_A), of_D, of_D + of_channels.nbytes // 2, address(grad_initial), address(of_matrices)),
        *(work.split, work.tiles_a_block, address(passed), address(progress), *scan.sizes),
    )
    grad_B, grad_C = into_matrices or (torch.empty(B.shape, dtype=x.dtype, device=u.device) for x in (B, C))
    grad_A, grad_D, grad_bias = new(A.shape), new(scan.channels), new(scan.channels)  # an op's outputs share no memory
    factors = contiguous_float32(A) if of_log else None
    work.sums(
        *(address(of_matrices), work.blocks, address(of_A), address(of_channels), scan.batch * work.splits),
        *(address(grad_B), address(grad_C), address(grad_A), address(grad_D), address(grad_bias)),
        *(grad_B.numel(), scan.channels, grad_B.stride(2 if into_matrices is None else 1), address(factors)),
    )
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial


class Arguments:
    """The tensors of a call as the kernels take them: addresses and strides, and the layout that these make."""

    def __init__(self, inputs: Inputs, options: Options, gradients: Sequence[Tensor] = ()) -> None:
        u, dt, B, C = _rows(inputs.u), _rows(inputs.dt), _rows(inputs.B), _rows(inputs.C)
        z = None if inputs.z is None else _rows(inputs.z)
        marks = None if inputs.segments is None else kernel_marks(inputs.segments)
        A, D, dt_bias = (contiguous_float32(x) for x in (inputs.A, inputs.D, inputs.dt_bias))
        self._held = (u, dt, A, B, C, D, z, dt_bias, marks)  # as long as their addresses are in use
        rows = (u, dt, B, C) if z is None else (u, dt, B, C, z)
        at_u, at_dt, at_B, at_C, at_z = (*(x.data_ptr() for x in rows), 0)[:5]
        strides = tuple(x.stride() for x in rows)
        of_u, of_dt, of_B, of_C, of_z = (*strides, (0, 0, 0))[:5]
        self.of_u, self.of_z = (at_u, *of_u[:2]), (at_z, *of_z[:2])
        self.of_dt, self.of_B, self.of_C = (at_dt, *of_dt[:2]), (at_B, *of_B[:3]), (at_C, *of_C[:3])
        self.of_steps = (address(A), address(dt_bias), address(marks))
        self.all = (
            *(*self.of_u, *self.of_dt, *self.of_z, *self.of_B, *self.of_C),
            *(address(A), address(D), address(dt_bias), address(marks)),
        )
        addresses = at_u | at_dt | at_B | at_C | at_z
        for gradient in gradients:
            addresses |= gradient.data_ptr()
        strides = (*strides, *(gradient.stride() for gradient in gradients))
        types = (u.dtype, dt.dtype, None if z is None else z.dtype, B.dtype, C.dtype)
        size, matrix, based = tuple(u.shape), tuple(B.shape[2:]), addresses % 16 == 0
        tensors = (u.device, size, matrix, types, strides, based, marks is not None)
        self.layout = Layout(*tensors, options.dt_softplus, options.discretization)


def _chain(scan: Scan, arguments: Arguments, x: Tensor | None, split: int, grad_y: Tensor | None) -> Tensor:
    """[b splits d n]: the state that each split begins with; given the gradient of y, what each gets from behind.

    x [b d n] is what the first split gets, or the last from behind; None for zeros.
    """
    reverse, splits = grad_y is not None, -(-scan.length // split)
    size = (2, scan.batch, splits, scan.channels, scan.states)
    local = torch.empty(size, dtype=torch.float32, device=scan.device)
    at, decays = address(local), address(local) + local.nbytes // 2
    walked = arguments.of_u if grad_y is None else (address(grad_y), *grad_y.stride()[:2])
    matrix = arguments.of_C if reverse else arguments.of_B
    summary, chain = scan.chain(split, reverse)
    summary(
        *(*walked, *arguments.of_dt, *arguments.of_z, *matrix, *arguments.of_steps, at, decays),
        *(int(reverse), split, splits, *scan.sizes),
    )
    chain(address(x), at, decays, splits, scan.channels * scan.states)
    return local[0]


def _rows(tensor: Tensor) -> Tensor:
    """The tensor in rows without gaps, and rows of a piece close enough for offsets of 32 bits."""
    return last_contiguous(tensor) if tensor.stride(1) < 2**31 // PIECE else tensor.contiguous()
