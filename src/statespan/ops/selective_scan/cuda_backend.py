"""The selective scan on NVIDIA GPUs: shapes, the division of the work, and scratch for the kernels of the `.cu` files.

docs/kernels.md has the design and what was measured.
"""

from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.cuda_kernels import Kernel, scalar_type
from statespan.ops.layout import contiguous_float32, last_contiguous
from statespan.ops.segments import token_marks

EVERY = 64  # tokens; the backward keeps the state before each EVERY-th token and computes the others again
THREADS = 128

# Clocks of a token on a multiprocessor with some blocks, by states a thread: (of one more block, of any), on an H100.
CLOCKS = {2: (43, 30), 4: (60, 62), 8: (93, 110)}
# The same where splits of the tokens fill it, with the summaries that this needs: a block's share at 8 states a thread.
CLOCKS_SPLIT = 240
# What the summaries of the splits cost, of the backward's main kernel.
SUMMARY_SHARE = 0.21

Strided = tuple[Tensor | int | None, ...]  # a tensor and the strides of its rows

_HERE = Path(__file__).parent
_forward = Kernel(_HERE / "forward.cu", "scan_forward")
_summary = Kernel(_HERE / "summary.cu", "scan_summary")
_chain = Kernel(_HERE / "summary.cu", "scan_chain")
_backward = Kernel(_HERE / "backward.cu", "scan_backward")


def starts_shape(u: Tensor, A: Tensor, keep_starts: bool) -> tuple[int, ...]:
    """The shape [b chunks d n] of the states before each chunk; no chunks unless they are kept."""
    return (u.shape[0], -(-u.shape[1] // EVERY) if keep_starts else 0, *A.shape)


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
    """y [b t d], the final state [b d n], and the states before each chunk."""
    scan = Scan(u, dt, A, B, C, D, z, dt_bias, initial_state, segments, dt_softplus, discretization)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    final = torch.empty(scan.batch, *A.shape, dtype=torch.float32, device=u.device)
    starts = torch.empty(starts_shape(u, A, keep_starts), dtype=torch.float32, device=u.device)
    if final.numel() == 0:
        return y, final, starts
    states, split = scan.forward_plan()
    given = _float32(initial_state)
    if split < scan.length:
        given = scan.chain(given, split, None)
    _forward(
        u.device,
        (scan.tiles(THREADS * states // scan.padded), scan.batch, -(-scan.length // split)),
        THREADS,
        scan.macros(states, EVERY=EVERY if keep_starts else 0),
        *(*scan.arguments, given, y, final, starts, split, *scan.sizes),
    )
    return y, final, starts


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
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state; those of inputs that are None mean nothing."""
    grad_y = last_contiguous(grad_y.to(u.dtype))
    scan = Scan(u, dt, A, B, C, D, z, dt_bias, grad_y, segments, dt_softplus, discretization)
    batch, length, groups = scan.batch, scan.length, scan.groups
    new = partial(torch.empty, dtype=torch.float32, device=u.device)
    grad_u, grad_dt = (torch.empty(u.shape, dtype=x.dtype, device=u.device) for x in (u, dt))
    grad_z = None if z is None else torch.empty(u.shape, dtype=z.dtype, device=u.device)
    grad_initial = new(batch, *A.shape)
    if starts.numel() == 0:
        others = (None if x is None else torch.zeros_like(x) for x in (A, B, C, D, z, dt_bias))
        return grad_u, grad_dt, *others, grad_initial
    threads, tile, macros, resident = scan.backward_shape()
    tiles_a_block = max(1, 64 // tile)  # narrow tiles take turns, so that `of_matrices` stays small
    blocks = -(-(scan.tiles(tile) // groups) // tiles_a_block)
    room = resident * _multiprocessors(u.device)
    split = _backward_split(blocks * groups * batch, -(-length // EVERY), room)
    splits, gradient = -(-length // split), (grad_y, *grad_y.stride()[:2])
    carries = _float32(grad_final)
    if splits > 1:
        carries = scan.chain(carries, split, gradient)
    of_A, of_channels = new(batch, splits, *A.shape), new(2, batch, splits, scan.channels)
    of_matrices = new(blocks, 2, batch, length, groups, scan.states)
    _backward(
        u.device,
        (groups * blocks, splits, batch),
        threads,
        macros,
        *(*scan.arguments, *gradient, starts, carries, grad_u, grad_dt, grad_z, of_A, of_channels[0], of_channels[1]),
        *(grad_initial, of_matrices, split, tiles_a_block, *scan.sizes),
    )
    grad_A, grad_D, grad_bias = of_A.sum((0, 1)), of_channels[0].sum((0, 1)), of_channels[1].sum((0, 1))
    grad_B, grad_C = of_matrices[:, 0].sum(0), of_matrices[:, 1].sum(0)
    return grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial


class Scan:
    """The arguments that the kernels share, and how the work is divided."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        other: Tensor | None,
        segments: Tensor | None,
        dt_softplus: bool,
        discretization: str,
    ) -> None:
        for tensor in (dt, A, B, C, D, z, dt_bias, other, segments):
            if tensor is not None and tensor.device != u.device:
                raise UserError(f"selective_scan: u is on {u.device}, and another tensor on {tensor.device}")
        u, dt, B, C = last_contiguous(u), last_contiguous(dt), last_contiguous(B), last_contiguous(C)
        z = None if z is None else last_contiguous(z)
        self.device, (self.batch, self.length, self.channels) = u.device, u.shape
        self.groups, self.states = B.shape[2], A.shape[1]
        self.padded = max(8, 1 << (self.states - 1).bit_length())
        self.sizes = (self.length, self.channels, self.groups)
        marks = None if segments is None else token_marks(segments)
        self.A, self.dt_bias, self.marks = _float32(A), _float32(dt_bias), marks
        skip = _float32(D)
        aligned = self.channels // self.groups % 8 == 0 and self.states % 8 == 0
        aligned &= all(_aligned(x) for x in (u, dt, B, C, z, other, skip, self.dt_bias) if x is not None)
        self.wide = max(tensor.element_size() for tensor in (u, dt, B, C)) == 4
        self.plain = aligned and discretization == "mamba" and not self.wide
        self.of_u: Strided = (u, *u.stride()[:2])
        self.of_dt: Strided = (dt, *dt.stride()[:2])
        self.of_z: Strided = (None, 0, 0) if z is None else (z, *z.stride()[:2])
        self.of_B: Strided = (B, *B.stride()[:3])
        self.of_C: Strided = (C, *C.stride()[:3])
        self.arguments: Strided = (
            *(*self.of_u, *self.of_dt, *self.of_z, *self.of_B, *self.of_C, self.A, skip, self.dt_bias, marks),
        )
        self.inputs: dict[str, str | int] = {
            **{"U": scalar_type(u), "DT": scalar_type(dt), "Z": scalar_type(u if z is None else z)},
            **{"BM": scalar_type(B), "CM": scalar_type(C), "STATES": self.states, "PADDED": self.padded},
            **{"ALIGNED": int(aligned), "HAS_Z": int(z is not None), "SOFTPLUS": int(dt_softplus)},
            **{"SEGMENTS": int(marks is not None), "DISCRETIZATION": DISCRETIZATIONS[discretization]},
        }

    def tiles(self, channels: int) -> int:
        """How many blocks of that many channels there are; a block's channels are of one group."""
        return self.groups * -(-(self.channels // self.groups) // channels)

    def macros(self, states: int, **more: str | int) -> tuple[tuple[str, str | int], ...]:
        """What the forward and the summary are compiled with, for so many states a thread."""
        lanes = self.padded // states
        group = min(max(lanes, 4), 8)  # tokens that are summed together, see forward.cu
        ahead = int(states * group <= 16)  # whether the next group's exponentials fit into registers, too
        # Of shared memory, in numbers of B.
        room = 512 if self.wide else 1024 if states <= 4 and self.padded == 32 else 2048
        tokens = max(min(8 * lanes, room // self.padded, 64), group * (1 + ahead))
        blocks = 3 if not self.plain or states == 2 else 4 if ahead or self.padded > 32 else 5
        sizes = {"STATES_A_THREAD": states, "THREADS": THREADS, "TOKENS": tokens, "BLOCKS": blocks, "AHEAD": ahead}
        return tuple({**self.inputs, **sizes, **more}.items())

    def forward_plan(self) -> tuple[int, int]:
        """States a thread and tokens a split: what is soonest done.

        Fewer states a thread make more threads of as many channels, at some cost; splits of the tokens make still
        more, and need their summaries first.
        """
        multiprocessors = _multiprocessors(self.device)

        def clocks(states: int) -> float:
            blocks = -(-self.tiles(THREADS * states // self.padded) * self.batch // multiprocessors)
            more, any_number = CLOCKS[states]
            return more * blocks + any_number

        whole = -(-self.length // EVERY) * EVERY
        states = min((s for s in CLOCKS if 2 <= self.padded // s <= 16), key=clocks)
        if self.padded // 2 < 8:
            return states, whole
        blocks = self.tiles(THREADS * 8 // self.padded) * self.batch
        splits = min(8 * multiprocessors // blocks, whole // (4 * EVERY))
        if splits < 4 or CLOCKS_SPLIT * blocks / multiprocessors > clocks(states):
            return states, whole
        return 8, -(-whole // splits // EVERY) * EVERY

    def chain(self, x: Tensor | None, split: int, of_y: Strided | None) -> Tensor:
        """[b splits d n]: the state that each split begins with; given the gradient of y, what each gets from behind.

        x [b d n] is what the first split gets, or the last from behind; None for zeros.
        """
        splits, states = -(-self.length // split), min(8, self.padded // 2)
        local = torch.empty(2, self.batch, splits, self.channels, self.states, dtype=torch.float32, device=self.device)
        reverse = int(of_y is not None)
        matrix, kind = (self.of_C, self.inputs["CM"]) if reverse else (self.of_B, self.inputs["BM"])
        macros = self.macros(states, REVERSE=reverse, MM=kind)
        _summary(
            self.device,
            (self.tiles(THREADS * states // self.padded), self.batch, splits - 1),
            THREADS,
            macros,
            *(*(of_y or self.of_u), *self.of_dt, *self.of_z, *matrix, self.A, self.dt_bias, self.marks),
            *(local[0], local[1], reverse, split, splits, *self.sizes),
        )
        size = self.channels * self.states
        grid = (-(-size // THREADS), self.batch, 1)
        _chain(self.device, grid, THREADS, macros, x, local[0], local[1], splits, size)
        return local[0]

    def backward_shape(self) -> tuple[int, int, tuple[tuple[str, str | int], ...], int]:
        """Threads a block, channels a tile, macros, and how many blocks a multiprocessor holds."""
        narrow = self.padded >= 64 or (self.padded == 32 and self.wide)  # by what fits into shared memory
        threads, states = 64 if narrow else 128, min(4, self.padded // 4)
        resident = 4 if narrow else 3 if self.plain and self.padded == 16 else 2
        sizes = {"STATES_A_THREAD": states, "THREADS": threads, "BLOCKS": resident}
        sizes |= {"PIECE": 4 if self.padded >= 64 else 8, "EVERY": EVERY}
        return threads, 2 * threads * states // self.padded, tuple({**self.inputs, **sizes}.items()), resident


@cache
def _backward_split(blocks: int, chunks: int, room: int) -> int:
    """Tokens a split: what is soonest done by `room` blocks at once, the summaries included."""

    def time(chunks_a_split: int) -> float:  # of a multiprocessor, in chunks
        splits = -(-chunks // chunks_a_split)
        waves = max(1.0, (blocks * splits / room + 2 * -(-blocks * splits // room)) / 3)  # late blocks run faster alone
        summaries = SUMMARY_SHARE * blocks * chunks / room if splits > 1 else 0
        return waves * (chunks_a_split + 0.3) + summaries

    return EVERY * min({-(-chunks // splits) for splits in range(1, 65)} | set(range(1, min(chunks, 8) + 1)), key=time)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(tensor: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    rows = zip(tensor.stride()[:-1], tensor.shape, strict=False)
    return tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride, count in rows if count > 1)


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else contiguous_float32(tensor)
