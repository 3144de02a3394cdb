"""How the kernels of `triton_kernels*.py` divide an SSD: tiles, splits and shares, inputs without gaps, the steps."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.gpu import multiprocessors
from statespan.ops.layout import contiguous, last_contiguous, near
from statespan.ops.segments import kernel_marks
from statespan.ops.ssd import triton_kernels as kernels
from statespan.ops.ssd.inputs import Inputs, Options
from statespan.ops.triton_kernels import power_of_two
from statespan.ops.triton_kernels.launcher import launch

STEP_HEADS = 16  # heads of a program of the kernels that look at dt
PART_N = 128  # states of a program of the kernels that can divide them


class Launch(NamedTuple):
    """Warps of a program, and stages of its loop: turns whose loads are on their way."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Sizes:
    """Tokens of a chunk, places of a head in a block, and the launch of each kernel on tiles."""

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


def sizes_that_fit(item_bytes: int, states: int, large: bool) -> Sizes:
    """The row of SIZES for the least number of states that is enough; large: whether the memory is Hopper's."""
    return next(SIZES[key] for key in sorted(SIZES) if key[0] == item_bytes and key[1] >= states and key[2] == large)


def tile_of(sizes: Sizes, dims: int, states: int) -> tuple[int, int]:
    """Places of a head in a block, and states."""
    return max(16, min(sizes.block_p, power_of_two(dims))), max(16, power_of_two(states))


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


def precision(device: torch.device) -> str:
    """How products of float32 are taken: as six of bfloat16, which together have all digits."""
    return "ieee" if device.type == "cpu" else "bf16x6"  # the interpreter knows no other


class Plan:
    """What all kernels are given. Heads and states fill their tiles (`padded`).

    Attributes:
        block_p, block_n: places of a head and states in a tile.
        blocks: tiles of a head. lanes: tiles of the batch. chunks: of a row.
        of_tokens: marks, total, low, scale and sign, the vectors that the kernels' docstring tells of.
        initial_state: [lanes block_p block_n], float32, or None.
    """

    def __init__(self, inputs: Inputs, options: Options, sizes: Sizes) -> None:
        self.options, self.sizes, self.device = options, sizes, inputs.x.device
        self.batch, self.length, self.heads, self.dims = inputs.x.shape
        self.groups, self.states = inputs.B.shape[2:]
        self.group_heads = self.heads // self.groups
        self.x, self.B, self.C, self.dt = near(inputs.x), near(inputs.B), near(inputs.C), last_contiguous(inputs.dt)
        self.D, self.A = inputs.D, inputs.A.contiguous()
        self.dt_bias = contiguous(inputs.dt_bias)
        self.marks = None if inputs.segments is None else kernel_marks(inputs.segments)
        self.chunk = max(16, min(sizes.chunk, power_of_two(options.chunk_size + 1) // 2))
        self.block_p, self.block_n = tile_of(sizes, self.dims, self.states)
        self.part_n = min(self.block_n, PART_N)
        self.blocks = self.dims // self.block_p
        self.lanes = self.batch * self.heads * self.blocks
        self.chunks = -(-self.length // self.chunk)
        self.of_tokens = (self.marks, *self._steps())
        self.initial_state = self.tiles(inputs.initial_state)

    def _steps(self) -> list[Tensor | None]:
        """total, low, scale and sign."""
        shape = (self.batch, self.heads, self.chunks * self.chunk)
        wanted = (True, self.x.dtype == torch.float32, True, self.options.discretization == "bilinear")
        vectors = [self.floats(*shape) if want else None for want in wanted]
        arguments = (self.dt, self.A, self.dt_bias, self.marks, *vectors, *self.step_arguments)
        launch(kernels.steps, self.step_grid, *arguments, **self.step_options)
        return vectors

    @property
    def step_grid(self) -> tuple[int, int]:
        """Programs of a kernel that looks at dt."""
        return self.batch * self.chunks, -(-self.heads // STEP_HEADS)

    @property
    def step_arguments(self) -> tuple[float, ...]:
        """Its numbers."""
        return self.length, self.heads, self.dt.stride(0), self.dt.stride(1), *self.options.dt_limit

    @property
    def step_options(self) -> dict[str, Any]:
        """Its constants and launch options."""
        options = {"DT_SOFTPLUS": self.options.dt_softplus, "DISCRETIZATION": self.options.discretization}
        return options | {"CHUNK": self.chunk, "HEADS": STEP_HEADS, "num_warps": 4}

    def tile_options(self, tuned: Launch) -> dict[str, Any]:
        """Constants and launch options of a kernel on tiles."""
        return {
            "CHUNK": self.chunk,
            "DIMS": self.dims,
            "BLOCK_P": self.block_p,
            "BLOCK_N": self.block_n,
            "PRECISION": precision(self.device) if self.x.dtype == torch.float32 else None,
            "num_warps": tuned.warps,
            "num_stages": tuned.stages,
        }

    @property
    def skip_strides(self) -> tuple[int, int, bool]:
        """Strides of D, and whether it is [h p]."""
        if self.D is None:
            return 0, 0, False
        return (self.D.stride(0), self.D.stride(1), True) if self.D.dim() == 2 else (self.D.stride(0), 0, False)

    @property
    def tile(self) -> tuple[int, int]:
        """The shape of a lane's state."""
        return self.block_p, self.block_n

    def floats(self, *shape: int) -> Tensor:
        """Memory for float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def tiles(self, state: Tensor | None) -> Tensor | None:
        """[b h p n] as float32 tiles of the lanes; what is no state is no tile."""
        return None if state is None else state.to(torch.float32).contiguous().view(self.lanes, *self.tile)

    def whole(self, tiles: Tensor) -> Tensor:
        """The reverse of `tiles`."""
        return tiles.view(self.batch, self.heads, self.dims, self.states)

    def splits(self) -> tuple[int, int]:
        """Splits of the chunks that run side by side, and chunks of a split: more than one only where lanes are few."""
        enough = 3 * multiprocessors(self.device)
        parts = 1 if 2 * self.lanes > enough else min(-(-enough // self.lanes), -(-self.chunks // 4))
        split = -(-self.chunks // parts)
        return -(-self.chunks // split), split

    def shares(self) -> tuple[int, int]:
        """Programs that share the lanes of a group, and lanes of each: enough programs to fill the GPU evenly."""
        lanes = self.group_heads * self.blocks
        programs = self.batch * self.chunks * self.groups
        parts = max(1, min(lanes, -(-3 * multiprocessors(self.device) // programs)))
        share = -(-lanes // parts)
        return -(-lanes // share), share
