"""How `stream.cu` is compiled and how its work is divided: a product of few rows on matrix units."""

import torch
from torch import Tensor

from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.multiply import HALVES
from statespan.ops.decode_step.project import FEW_ROWS, Convolved, Gated, Normed, Product, macros_of
from statespan.ops.decode_step.weights import Projection
from statespan.ops.gpu import multiprocessors, shared_memory

WARPS = 16
MOST_AHEAD = 6  # registers of a lane for 2 x 16 bytes each; more of them spill
LEAST_ROWS = 2
ROUND_STEPS = 2  # what sums and results of a tile cost, in steps
SUMS_BYTES = 2 * WARPS * 8 * 17 * 4  # of shared memory

After = Convolved | str | None


def takes(projection: Projection, rows: int, before: Normed | Gated | None) -> bool:
    """Whether the kernel is made for this, and faster than project.cu."""
    weight = projection.weight
    (outputs, inputs), device = weight.shape[-2:], weight.device
    norms_all = not isinstance(before, Gated) or before.weight is None or before.group == inputs
    fits = 4 * rows * (-(-inputs // 32) * 32 + 32) + SUMS_BYTES + 1024 <= shared_memory(device)
    many = outputs >= 8 * multiprocessors(device)
    kind = weight.dim() == 2 and weight.dtype in HALVES
    return LEAST_ROWS <= rows <= FEW_ROWS and kind and norms_all and fits and many


class Stream:
    """y = W x of one projection, with what happens before and after; as Product."""

    def __init__(
        self,
        projection: Projection,
        rows: int,
        hidden_dtype: torch.dtype,
        *,
        before: Normed | Gated | None = None,
        after: After = None,  # a string: an activation's name
        add: bool = False,  # to the residual stream
        outputs: int | None = None,  # only the first of them
    ) -> None:
        weight = projection.weight
        total, inputs = weight.shape
        self.projection, self.before, self.after, self.outputs = projection, before, after, outputs or total
        tiles, chunks, blocks = -(-self.outputs // 16), -(-inputs // 32), multiprocessors(weight.device)

        def cost(split: int) -> int:
            """Steps of the busiest warp."""
            return -(-tiles // (blocks * WARPS // split)) * (-(-chunks // split) + ROUND_STEPS)

        split = min((4, 8, 16), key=cost)
        steps = -(-chunks // split)
        ahead = max(count for count in range(1, MOST_AHEAD + 1) if steps % count == 0)
        macros = macros_of(projection, rows, hidden_dtype, before, after, add)
        macros |= {"WARPS": WARPS, "SPLIT": split, "AHEAD": ahead}
        pitch = 64 * chunks + (0 if chunks % 2 else 64)
        grid = (min(blocks, -(-tiles * split // WARPS)), 1)
        self._launch = Launch("stream", weight.device, grid, 32 * WARPS, macros, 2 * rows * pitch + SUMS_BYTES)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        z: Tensor | None = None,
        conv_state: Tensor | None = None,
        ahead: Tensor | None = None,
    ) -> None:
        """x and y are [rows ..], z as x; conv_state is overwritten; `ahead` are weights to be brought to L2."""
        p, conv = self.projection, self.after if isinstance(self.after, Convolved) else None
        norm = None if self.before is None else self.before.weight
        self._launch(
            *(p.weight, p.bias, x, x.stride(0), z, 0 if z is None else z.stride(0), norm),
            *(y, y.stride(0), self.outputs, conv_state),
            *((None, None, 0, 0) if conv is None else (conv.weight, conv.bias, conv.start, conv.weight.shape[0])),
            *(ahead, 0 if ahead is None else ahead.nbytes // 16 * 16),
        )


def product(
    projection: Projection,
    rows: int,
    hidden_dtype: torch.dtype,
    *,
    before: Normed | Gated | None = None,
    after: After = None,
    add: bool = False,
    outputs: int | None = None,
) -> Product | Stream:
    """The kernel for a dense product of few rows."""
    kind = Stream if takes(projection, rows, before) else Product
    return kind(projection, rows, hidden_dtype, before=before, after=after, add=add, outputs=outputs)
