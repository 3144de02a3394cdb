"""How `multiply.cu` is compiled and how its work is divided: a product for 9 or more rows on matrix units."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from statespan.ops.decode_step.launch import Launch, clusters
from statespan.ops.decode_step.project import TYPES, aligned
from statespan.ops.decode_step.weights import Projection
from statespan.ops.gpu import multiprocessors, shared_memory

HALVES = (torch.bfloat16, torch.float16)
ROWS = 64  # of a block, at most
PART = 64  # inputs of a stage
LINE = 2 * PART  # bytes of one row in it
STAGES = 12  # at most
WARPS = 8  # of a block
MOST_TILES = 20  # of a warp, for which there are registers
FIXED_BYTES = 40 << 10  # what a block's beginning and end cost, as bytes that it could have read
OWN_BYTES = 1 << 10  # of shared memory, that the driver keeps of every block


def multiplies(projection: Projection) -> bool:
    """Whether multiply.cu takes it: 16-bit weights, no bias."""
    weight = projection.weight
    plain = projection.scale is None and projection.bias is None
    return plain and weight.dtype in HALVES and weight.dim() == 2 and aligned(projection)


@dataclass(frozen=True)
class Tiling:
    """How a product is divided: warps by rows and outputs, tiles of a warp, blocks that share the inputs."""

    m_warps: int
    m_tiles: int
    n_warps: int
    n_tiles: int
    split: int

    @property
    def outputs(self) -> int:
        """Of a block."""
        return 8 * self.n_tiles * self.n_warps

    @property
    def rows(self) -> int:
        """Of x in shared memory."""
        return 16 * self.m_tiles * self.m_warps

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.m_warps * self.n_warps

    def sums_bytes(self) -> int:
        """Of the block's sums."""
        return self.rows * (self.outputs + 8) * 4

    def stage_bytes(self) -> int:
        """Of weights and x."""
        return (self.outputs + self.rows) * LINE

    def steps(self, inputs: int) -> int:
        """Stages that a block goes through."""
        return ceil(ceil(inputs / PART) / self.split)

    def cost(self, outputs: int, inputs: int, device: torch.device) -> int:
        """Bytes that the busiest multiprocessor reads."""
        rounds = ceil(ceil(outputs / self.outputs) * self.split / multiprocessors(device))
        exchanged = self.sums_bytes() if self.split > 1 else 0
        return rounds * (self.steps(inputs) * self.stage_bytes() + exchanged + FIXED_BYTES)


def _room(device: torch.device) -> int:
    """Bytes of shared memory of a block, two of which are to fit into a multiprocessor."""
    return (shared_memory(device) + OWN_BYTES) // 2 - OWN_BYTES


def tiling(outputs: int, inputs: int, rows: int, device: torch.device) -> Tiling:
    """The cheapest division."""
    rows = min(rows, ROWS)
    choices = [
        Tiling(m_warps, m_tiles, WARPS // m_warps, n_tiles, split)
        for m_warps in (1, 2, 4)
        for n_tiles in range(1, 7)
        for split in (1, 2, 4, 8)
        if (m_tiles := ceil(rows / (16 * m_warps))) * n_tiles <= MOST_TILES
    ]
    room = _room(device)
    fit = [c for c in choices if clusters(device, c.split) and max(3 * c.stage_bytes(), c.sums_bytes()) <= room]
    return min(fit, key=lambda choice: choice.cost(outputs, inputs, device))


class Multiply:
    """y = W x of one projection without bias, in float32: see multiply.cu."""

    def __init__(self, projection: Projection, rows: int, outputs: int | None = None) -> None:
        """`outputs`: only the first of them."""
        weight = self._weight = projection.weight
        self.outputs, inputs = outputs or weight.shape[0], weight.shape[1]
        tile = tiling(self.outputs, inputs, rows, weight.device)
        stages = max(3, min(STAGES, _room(weight.device) // tile.stage_bytes(), tile.steps(inputs) + 1))
        macros: dict[str, str | int] = {
            **{"W": TYPES[weight.dtype], "INPUTS": inputs, "BATCH": rows, "SPLIT": tile.split, "STAGES": stages},
            **{"M_WARPS": tile.m_warps, "N_WARPS": tile.n_warps, "M_TILES": tile.m_tiles, "N_TILES": tile.n_tiles},
            "ALIGNED": int(self.outputs % 4 == 0),
        }
        groups = (ceil(self.outputs / tile.outputs), ceil(rows / tile.rows))
        shared = max(stages * tile.stage_bytes(), tile.sums_bytes())
        self._launch = Launch("multiply", weight.device, groups, tile.threads, macros, shared, cluster=tile.split)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows inputs] in the weight's dtype to y [rows outputs]."""
        y = torch.empty(len(x), self.outputs, dtype=torch.float32, device=x.device)
        self._launch(self._weight, x, x.stride(0), y, y.stride(0), self.outputs)
        return y
