# pyright: reportCallIssue=false, reportArgumentType=false
# A launch takes options, num_warps and num_stages, no parameters of the kernel, and plain values for constants.
"""The chunked SSD on GPUs: tensors, the division of the work and scratch for the kernels of `triton_kernels*.py`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.gpu import multiprocessors, shared_memory
from statespan.ops.layout import contiguous, last_contiguous
from statespan.ops.segments import token_marks
from statespan.ops.ssd import triton_kernels as kernels
from statespan.ops.ssd import triton_kernels_backward as backward_kernels
from statespan.ops.ssd.inputs import Inputs, Options
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.tuning import Tunable

STEP_HEADS = 16  # heads of a program of the kernels that look at dt
PART_N = 128  # states of a program of the kernels that can divide them
CHAIN_BLOCK = 512  # values of the state of a program of `chain`
# What the assembler is to give a thread; for sm_80 it may choose 32 and spill thousands of bytes.
MOST_REGISTERS = {"maxnreg": 255} if torch.version.hip is None else {}


class Launch(NamedTuple):
    """Warps of a program, and stages of its loop: turns whose loads are on their way."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Sizes:
    """Tokens of a chunk, and places of a head in a block."""

    chunk: int
    block_p: int
    outputs: Launch
    states: Launch
    gradients: Launch
    columns: Launch


# By (bytes of a value, states, whether the shared memory is Hopper's). Measured on an H100, where the launches of the
# first two are in the tuning table; the others only fit.
SIZES = {
    (2, 128, True): Sizes(64, 64, Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1)),
    (2, 256, True): Sizes(64, 64, Launch(8, 1), Launch(4, 1), Launch(8, 1), Launch(4, 1)),
    (4, 128, True): Sizes(32, 32, Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1)),
    (4, 256, True): Sizes(32, 32, Launch(8, 1), Launch(4, 1), Launch(8, 1), Launch(4, 1)),
    (2, 128, False): Sizes(32, 32, Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1)),
    (2, 256, False): Sizes(16, 32, Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1)),
    (4, 256, False): Sizes(16, 16, Launch(4, 1), Launch(4, 1), Launch(4, 1), Launch(4, 1)),
}


def sizes_for(x: Tensor, states: int) -> Sizes:
    """The row of SIZES for the least number of states that is enough, with the table's launches where it has some."""
    large, item_bytes = shared_memory(x.device) >= 160 << 10, max(2, x.element_size())
    sizes = next(
        SIZES[key] for key in sorted(SIZES) if key[0] == item_bytes and key[1] >= states and key[2] == large
    )  # fmt: skip
    if not large or item_bytes != 2:
        return sizes
    launches = {tunable.name.removeprefix("ssd."): tunable.best(x.device, power_of_two(states)) for tunable in TUNABLES}
    return replace(sizes, **{kernel: Launch(**tuned) for kernel, tuned in launches.items()})


def tile_of(sizes: Sizes, dims: int, states: int) -> tuple[int, int]:
    """Places of a head in a block, and states."""
    return max(16, min(sizes.block_p, power_of_two(dims))), max(16, power_of_two(states))


def precision(device: torch.device) -> str:
    """How products of float32 are taken: as six of bfloat16, which together have all digits."""
    return "ieee" if device.type == "cpu" else "bf16x6"  # the interpreter knows no other


class Scan:
    """What all kernels are given: inputs without gaps, the vectors of the steps, and sizes."""

    def __init__(self, inputs: Inputs, options: Options, sizes: Sizes) -> None:
        self.options, self.sizes, self.device = options, sizes, inputs.x.device
        self.batch, self.length, self.heads, self.dims = inputs.x.shape
        self.groups, self.states = inputs.B.shape[2:]
        self.x, self.B, self.C, self.dt = (last_contiguous(v) for v in (inputs.x, inputs.B, inputs.C, inputs.dt))
        self.D, self.A = inputs.D, inputs.A.contiguous()
        self.dt_bias = contiguous(inputs.dt_bias)
        self.marks = None if inputs.segments is None else token_marks(inputs.segments)
        self.chunk = max(16, min(sizes.chunk, power_of_two(options.chunk_size + 1) // 2))
        self.block_p, self.block_n = tile_of(sizes, self.dims, self.states)
        self.part_n = min(self.block_n, PART_N)
        self.blocks = self.dims // self.block_p
        self.lanes = self.batch * self.heads * self.blocks
        self.chunks = -(-self.length // self.chunk)
        self.total, self.low, self.scale, self.sign = self._steps()
        self.initial_state = self._tiles(inputs.initial_state)

    def _steps(self) -> list[Tensor | None]:
        shape = (self.batch, self.heads, self.chunks * self.chunk)
        wanted = (True, self.x.dtype == torch.float32, True, self.options.discretization == "bilinear")
        vectors = [self.floats(*shape) if want else None for want in wanted]
        kernels.steps[self._step_grid](
            self.dt, self.A, self.dt_bias, self.marks, *vectors, *self.step_arguments, **self._step_options
        )
        return vectors

    @property
    def _step_grid(self) -> tuple[int, int]:
        return self.batch * self.chunks, -(-self.heads // STEP_HEADS)

    @property
    def step_arguments(self) -> tuple[float, ...]:
        return self.length, self.heads, self.dt.stride(0), self.dt.stride(1), *self.options.dt_limit

    @property
    def _step_options(self) -> dict[str, Any]:
        options = {"DT_SOFTPLUS": self.options.dt_softplus, "DISCRETIZATION": self.options.discretization}
        return options | {"CHUNK": self.chunk, "HEADS": STEP_HEADS, "num_warps": 4}

    @property
    def tile(self) -> tuple[int, int]:
        return self.block_p, self.block_n

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _tiles(self, state: Tensor | None) -> Tensor | None:
        """[b h p n] as float32 tiles of the lanes; what is no state is no tile."""
        return None if state is None else state.to(torch.float32).contiguous().view(self.lanes, *self.tile)

    def whole(self, tiles: Tensor) -> Tensor:
        """The reverse of `_tiles`."""
        return tiles.view(self.batch, self.heads, self.dims, self.states)

    def options_of(self, launch: Launch) -> dict[str, Any]:
        """Sizes and launch options of a kernel on tiles."""
        return {
            "CHUNK": self.chunk,
            "DIMS": self.dims,
            "BLOCK_P": self.block_p,
            "BLOCK_N": self.block_n,
            "PRECISION": precision(self.device) if self.x.dtype == torch.float32 else None,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def split(self) -> tuple[int, int]:
        """Splits of the chunks that run side by side, and chunks of a split: more than one only where lanes are few."""
        enough = 3 * multiprocessors(self.device)
        parts = 1 if 2 * self.lanes > enough else min(-(-enough // self.lanes), -(-self.chunks // 4))
        split = -(-self.chunks // parts)
        return -(-self.chunks // split), split

    def starts(self, x: Tensor, B: Tensor, given: Tensor | None, *, reverse: bool) -> Tensor | None:
        """The states that the splits start from; `given` itself where there is but one split."""
        parts, split = self.split()
        if parts == 1:
            return given
        starts, decays = self.floats(self.lanes, parts, *self.tile), self.floats(self.lanes, parts)
        self._states(x, B, None, None, starts, decays, parts, split, reverse)
        size = self.block_p * self.block_n
        block = min(size, CHAIN_BLOCK)
        kernels.chain[(self.lanes, size // block)](
            starts, decays, given, parts, REVERSE=reverse, SIZE=size, BLOCK=block, num_warps=4
        )
        return starts

    def kept(self, x: Tensor, B: Tensor, given: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor | None]:
        """The state before each chunk; in reverse the gradient after each, and the one before the first."""
        starts = self.starts(x, B, given, reverse=reverse)
        parts, split = self.split()
        kept = self.x.new_empty(self.lanes, self.chunks, *self.tile)
        ends = self.floats(self.lanes, parts, *self.tile) if reverse else None
        self._states(x, B, starts, kept, ends, None, parts, split, reverse)
        return kept, None if ends is None else ends[:, 0].contiguous()

    def _states(
        self,
        x: Tensor,
        B: Tensor,
        starts: Tensor | None,
        keep: Tensor | None,
        ends: Tensor | None,
        decays: Tensor | None,
        parts: int,
        split: int,
        reverse: bool,
    ) -> None:
        kernels.states[(self.lanes, parts, self.block_n // self.part_n)](
            x,
            B,
            self.marks,
            self.total,
            self.low,
            self.scale,
            self.sign,
            starts,
            keep,
            ends,
            decays,
            self.length,
            self.chunks,
            split,
            self.heads,
            self.heads // self.groups,
            *x.stride()[:3],
            *B.stride()[:3],
            REVERSE=reverse,
            PART_N=self.part_n,
            **self.options_of(self.sizes.states),
        )

    def outputs(self) -> tuple[Tensor, Tensor]:
        """y and the final state."""
        starts = self.starts(self.x, self.B, self.initial_state, reverse=False)
        parts, split = self.split()
        y = self.x.new_empty(self.x.shape)
        final = self.floats(self.lanes, *self.tile)
        kernels.outputs[(self.lanes, parts)](
            self.x,
            self.B,
            self.C,
            self.D,
            self.marks,
            self.total,
            self.low,
            self.scale,
            self.sign,
            starts,
            y,
            final,
            self.length,
            self.chunks,
            split,
            self.heads,
            self.heads // self.groups,
            *self.x.stride()[:3],
            *self.B.stride()[:3],
            *self.C.stride()[:3],
            *self.skip_strides,
            **self.options_of(self.sizes.outputs),
        )
        return y, self.whole(final)

    @property
    def skip_strides(self) -> tuple[int, int, bool]:
        """Strides of D, and whether it is [h p]."""
        if self.D is None:
            return 0, 0, False
        return (self.D.stride(0), self.D.stride(1), True) if self.D.dim() == 2 else (self.D.stride(0), 0, False)

    def shares(self) -> tuple[int, int]:
        """Programs that share the lanes of a group, and lanes of each: enough programs to fill the GPU evenly."""
        lanes = self.heads // self.groups * self.blocks
        programs = self.batch * self.chunks * self.groups
        parts = max(1, min(lanes, -(-3 * multiprocessors(self.device) // programs)))
        share = -(-lanes // parts)
        return -(-lanes // share), share

    def gradients(self, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, A, B, C, D, dt_bias and the initial state, as `chunked.backward` gives them."""
        grad_y = last_contiguous(grad_y)
        kept, _ = self.kept(self.x, self.B, self.initial_state, reverse=False)
        grad_kept, first = self.kept(grad_y, self.C, self._tiles(grad_final), reverse=True)
        grad_x, grad_D, sums, grad_scores = self._grad_x(grad_y, kept, grad_kept)
        grad_B = self._grad_columns(self.x, self.B, self.C, grad_kept, grad_scores, reverse=False)
        grad_C = self._grad_columns(grad_y, self.C, self.B, kept, grad_scores, reverse=True)
        del kept, grad_kept, grad_scores
        grad_dt = torch.empty(self.dt.shape, dtype=self.dt.dtype, device=self.device)
        grad_A, grad_bias, *skip = self.floats(len(sums[0]) - 2, self.batch * self.chunks, self.heads)
        grad_D = skip[0] if skip else grad_D
        backward_kernels.steps_backward[self._step_grid](
            *sums,
            self.dt,
            self.A,
            self.dt_bias,
            self.marks,
            grad_dt,
            grad_A,
            grad_bias,
            skip[0] if skip else None,
            *self.step_arguments,
            **self._step_options,
            BLOCKS=self.blocks,
        )
        return (
            grad_x,
            grad_dt,
            grad_A.sum(0),
            grad_B,
            grad_C,
            None if grad_D is None else grad_D.sum(0),
            None if self.dt_bias is None else grad_bias.sum(0),
            None if self.initial_state is None or first is None else self.whole(first),
        )

    def _grad_x(
        self, grad_y: Tensor, kept: Tensor, grad_kept: Tensor
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], Tensor]:
        """grad_x, each chunk's part of D's gradient, the sums for dt's, and the gradient of B C^T in parts."""
        parts, share = self.shares()
        programs = self.batch * self.chunks * self.groups
        grad_x = self.x.new_empty(self.x.shape)
        grad_scores = self.x.new_empty(parts, programs, self.chunk, self.chunk)
        grad_D = None
        if self.D is not None and self.D.dim() == 2:
            grad_D = self.floats(self.batch * self.chunks, self.heads, self.dims)
        sums = (
            self.floats(4 if self.D is None or self.D.dim() == 2 else 5, self.lanes, self.chunks * self.chunk),
            self.floats(self.lanes, self.chunks),
        )
        backward_kernels.gradients[(programs, parts)](
            grad_y,
            self.x,
            self.B,
            self.C,
            self.D,
            self.marks,
            self.total,
            self.low,
            self.scale,
            self.sign,
            kept,
            grad_kept,
            grad_x,
            grad_scores,
            grad_D,
            *sums,
            self.length,
            self.chunks,
            self.heads,
            self.heads // self.groups,
            share,
            *grad_y.stride()[:3],
            *self.x.stride()[:3],
            *self.B.stride()[:3],
            *self.C.stride()[:3],
            *self.skip_strides,
            **self.options_of(self.sizes.gradients),
            **MOST_REGISTERS,
        )
        return grad_x, grad_D, sums, grad_scores

    def _grad_columns(
        self, x: Tensor, B: Tensor, C: Tensor, kept: Tensor, grad_scores: Tensor, *, reverse: bool
    ) -> Tensor:
        """The gradient of B or, with the roles of both sides exchanged and reverse, of C."""
        parts, share = self.shares()
        grad = torch.empty(parts, *B.shape, dtype=self.x.dtype if parts == 1 else torch.float32, device=self.device)
        backward_kernels.gradients_of_columns[
            (self.batch * self.chunks * self.groups, parts, self.block_n // self.part_n)
        ](
            x,
            C,
            self.marks,
            self.total,
            self.low,
            self.scale,
            self.sign,
            kept,
            grad_scores,
            grad,
            self.length,
            self.chunks,
            grad_scores.shape[0],
            self.heads,
            self.heads // self.groups,
            share,
            *x.stride()[:3],
            *C.stride()[:3],
            REVERSE=reverse,
            PART_N=self.part_n,
            **self.options_of(self.sizes.columns),
        )
        return grad[0] if parts == 1 else grad.sum(0)


def padded(inputs: Inputs, sizes: Sizes) -> Inputs:
    """With heads and states that fill their tiles.

    The assembler of Triton 3.6 (ptxas 12.8) may lose the address of a masked tile: it reads a uniform register that
    nothing has written.
    """
    dims, states = inputs.x.shape[3], inputs.B.shape[3]
    block_p, block_n = tile_of(sizes, dims, states)
    more_dims, more_states = -dims % block_p, block_n - states
    if not more_dims and not more_states:
        return inputs
    x, B, C, D, state = inputs.x, inputs.B, inputs.C, inputs.D, inputs.initial_state
    return replace(
        inputs,
        x=F.pad(x, (0, more_dims)),
        B=F.pad(B, (0, more_states)),
        C=F.pad(C, (0, more_states)),
        D=D if D is None or D.dim() == 1 else F.pad(D, (0, more_dims)),
        initial_state=None if state is None else F.pad(state, (0, more_states, 0, more_dims)),
    )


def _cut(value: Tensor, shape: torch.Size) -> Tensor:
    """What was there before it was padded."""
    return (value if value.shape == shape else value[tuple(map(slice, shape))]).contiguous()


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.ssd`."""
    x = inputs.x
    of_state = torch.Size((x.shape[0], *x.shape[2:], inputs.B.shape[3]))
    if x.numel() == 0:  # no rows
        return x.new_empty(x.shape), x.new_empty(of_state, dtype=torch.float32)
    with on(x.device):
        sizes = sizes_for(x, inputs.B.shape[3])
        y, state = Scan(padded(inputs, sizes), options, sizes).outputs()
    return _cut(y, x.shape), _cut(state, of_state)


def backward(grad_y: Tensor, grad_final: Tensor, inputs: Inputs, options: Options) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state in their dtypes; None where the input is None."""
    if inputs.x.numel() == 0:
        return tuple(None if value is None else value.new_zeros(value.shape) for value in inputs.differentiable)
    sizes = sizes_for(inputs.x, inputs.B.shape[3])
    whole = padded(inputs, sizes)
    more_dims, more_states = whole.x.shape[3] - inputs.x.shape[3], whole.B.shape[3] - inputs.B.shape[3]
    if more_dims or more_states:
        grad_y, grad_final = F.pad(grad_y, (0, more_dims)), F.pad(grad_final, (0, more_states, 0, more_dims))
    with on(inputs.x.device):
        found = Scan(whole, options, sizes).gradients(grad_y, grad_final)
    return tuple(
        None if gradient is None or value is None else _cut(gradient, value.shape).to(value.dtype)
        for gradient, value in zip(found, inputs.differentiable, strict=True)
    )


def _trial(backwards: bool) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, states: int) -> Callable[[], object]:
        x, grad = (torch.randn(8, 2048, 24, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
        dt, A = torch.rand(8, 2048, 24, dtype=torch.bfloat16, device=device), -torch.rand(24, device=device)
        B, C = (torch.randn(8, 2048, 1, states, dtype=torch.bfloat16, device=device) for _ in range(2))
        inputs, options = Inputs(x, dt, A, B, C, A, A, None, None), Options(True, (0.0, math.inf), 256, "mamba")
        if backwards:
            grad_final = torch.zeros(8, 24, 64, states, device=device)
            return lambda: backward(grad, grad_final, inputs, options)
        return lambda: forward(inputs, options)

    return trial


_LAUNCHES = {"warps": (4, 8), "stages": (1, 2, 3)}
TUNABLES = (
    Tunable("ssd.outputs", (64, 128, 256), _trial(False), **_LAUNCHES),
    Tunable("ssd.states", (64, 128, 256), _trial(True), **_LAUNCHES),
    Tunable("ssd.gradients", (64, 128, 256), _trial(True), **_LAUNCHES),
    Tunable("ssd.columns", (64, 128, 256), _trial(True), **_LAUNCHES),
)
