"""The small kernels of a decoding step: norm, conv and the recurrences, with everything but addresses fixed."""

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from statespan.ops.arguments import DISCRETIZATIONS
from statespan.ops.decode_step.large import tile_rows
from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.project import TYPES, Convolved, Normed
from statespan.ops.decode_step.weights import Mamba1Weights, Mamba2Weights, Projection
from statespan.ops.gpu import multiprocessors, shared_memory

UPDATE_WARPS = 4
RECUR_ROWS, RECUR_CHANNELS, RECUR_STATES, RECUR_RANK = 8, 64, 16, 512  # of a block; the last is the largest
RECUR_BLOCKS = 3  # that a multiprocessor holds
REDUCERS = 2  # of them, that add up what in_proj's blocks left for x_proj, at most


class Update:
    """The recurrence of update.cu, in place."""

    def __init__(
        self,
        w: Mamba1Weights | Mamba2Weights,
        rows: int,
        dtype: torch.dtype,
        head_size: int,
        heads: int,
        states: int,
        *,
        rank: int = 0,
        group_heads: int = 1,
    ) -> None:
        ssd = isinstance(w, Mamba2Weights)
        self._w, self._heads, self._sizes = w, heads, (heads, head_size, group_heads)
        norms = () if isinstance(w, Mamba2Weights) or rank == 0 else w.inner_norms
        self._norms = norms or (None, None, None)
        self._dt_proj = w.dt_proj if isinstance(w, Mamba1Weights) and rank else Projection(w.D)
        shared_by = 4 if states <= 16 else 8 if states <= 32 else 16 if states <= 64 else 32
        tile = 4 if ssd and states > 64 else 1
        low, high = w.dt_limit if isinstance(w, Mamba2Weights) else (0.0, float("inf"))
        macros: dict[str, str | int] = {
            **{"X": TYPES[dtype], "W": TYPES[self._dt_proj.weight.dtype], "P": TYPES[w.norm.dtype], "STATES": states},
            **{"SHARED_BY": shared_by, "TILE": tile, "WARPS": UPDATE_WARPS, "SSD": int(ssd), "RANK": rank},
            **{"NORMS": int(bool(norms)), "DISCRETIZATION": DISCRETIZATIONS[w.discretization]},
            **{"EPSILON": f"{w.inner_norm_epsilon if isinstance(w, Mamba1Weights) else 0.0:.9e}f"},
            **{"LOW": f"{low:.9e}f", "HIGH": f"{min(high, 3e38):.9e}f"},
        }
        tiles = -(-head_size // (32 * UPDATE_WARPS // shared_by * tile))
        self._launch = Launch("update", w.norm.device, (heads * tiles, rows), 32 * UPDATE_WARPS, macros)

    def __call__(
        self,
        x: Tensor,
        z: Tensor | None,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        y: Tensor,
        ahead: Tensor | None = None,
    ) -> None:
        """x, z and y [rows channels], dt what dt_proj is fed or what it gave, B and C [rows groups * states]."""
        of_z = (None, 0) if z is None else (z, z.stride(0))
        self._launch(
            *(x, x.stride(0), *of_z, dt, dt.stride(0), B, B.stride(0), C, C.stride(0)),
            *(self._dt_proj.weight, self._dt_proj.scale, self._w.dt_bias, *self._norms),
            *(self._w.A_log, self._w.D, state, y, y.stride(0), *self._sizes),
            *(ahead, 0 if ahead is None else ahead.nbytes // 16 * 16),
        )


def mamba2_update(
    w: Mamba2Weights, rows: int, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], None]:
    """(in_proj's outputs after the conv, state, y, weights to be brought to L2): the recurrence of all heads."""
    inner, heads, conv_size = w.out_proj.weight.shape[1], w.A_log.shape[0], w.conv_weight.shape[0]
    bc_size = (conv_size - inner) // 2
    update = Update(w, rows, dtype, inner // heads, heads, w.state_size, group_heads=heads * w.state_size // bc_size)

    def run(projected: Tensor, state: Tensor, y: Tensor, ahead: Tensor | None) -> None:
        x, B, C, dt = (projected[:, inner + skip :] for skip in (0, inner, inner + bc_size, conv_size))
        update(x, None, dt, B, C, state, y, ahead=ahead)

    return run


class Convolve:
    """The conv and SiLU of convolve.cu, in place."""

    def __init__(self, conv: Convolved, rows: int, dtype: torch.dtype) -> None:
        self._weight, self._bias = weight, _ = conv.weight, conv.bias
        macros: dict[str, str | int] = {"X": TYPES[dtype], "S": TYPES[conv.state_dtype], "P": TYPES[weight.dtype]}
        grid = (-(-weight.shape[0] // 128), rows)
        self._launch = Launch("convolve", weight.device, grid, 128, macros | {"TAPS": weight.shape[1]})

    def __call__(self, x: Tensor, window: Tensor) -> None:
        self._launch(x, x.stride(0), window, self._weight, self._bias, self._weight.shape[0])


class Normalize:
    """RMSNorm of the residual stream, see normalize.cu."""

    def __init__(self, norm: Normed, rows: int, hidden_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
        self._weight, self._dtype = norm.weight, out_dtype
        macros: dict[str, str | int] = {
            **{"H": TYPES[hidden_dtype], "P": TYPES[norm.weight.dtype], "W": TYPES[out_dtype]},
            **{"INPUTS": norm.weight.shape[0], "EPSILON": f"{norm.epsilon:.9e}f"},
        }
        self._launch = Launch("normalize", norm.weight.device, (rows, 1), 256, macros)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The normalised rows."""
        y = torch.empty_like(hidden, dtype=self._dtype)
        self._launch(hidden, hidden.stride(0), self._weight, y, y.stride(0))
        return y


class Recur:
    """From x_proj's outputs to y, see recur.cu."""

    def __init__(self, w: Mamba1Weights, rows: int, *, tiled: bool = False, sums: int = 0) -> None:
        """`tiled`: y lies in `large.tiles`; `sums`: x_proj's outputs come as so many sums over channels, or 0."""
        self._w, self._norms = w, w.inner_norms or (None, None, None)
        channels, rank = w.dt_proj.weight.shape
        parts = -(-rank // 32)
        pitch = parts * 64 + (0 if parts % 2 else 64)
        fixed = 4 * RECUR_ROWS * (2 * RECUR_STATES + 3 * RECUR_CHANNELS) + RECUR_ROWS * pitch  # of a group of rows
        states = 4 * RECUR_ROWS * RECUR_CHANNELS * RECUR_STATES
        shared = [RECUR_CHANNELS * pitch + fixed * groups + states * (groups - 1) for groups in (1, 2)]
        few, many = (channels // RECUR_CHANNELS * ceil(rows / size) for size in (2 * RECUR_ROWS, RECUR_ROWS))
        at_once = RECUR_BLOCKS * multiprocessors(w.norm.device)
        fits = RECUR_BLOCKS * shared[1] <= shared_memory(w.norm.device)
        groups = 2 if fits and few <= at_once < many else 1
        macros: dict[str, str | int] = {
            **{"W": TYPES[w.dt_proj.weight.dtype], "P": TYPES[w.norm.dtype], "RANK": rank, "BATCH": rows},
            **{"NORMS": int(bool(w.inner_norms)), "EPSILON": f"{w.inner_norm_epsilon:.9e}f"},
            **{"DISCRETIZATION": DISCRETIZATIONS[w.discretization], "AHEAD": at_once},
            **{"TILE_ROWS": tile_rows(rows) if tiled else 0, "GROUPS": groups, "SUMS": sums, "ONCE": int(tiled)},
        }
        grid = (channels // RECUR_CHANNELS, ceil(rows / (RECUR_ROWS * groups)))
        macros["REDUCERS"] = min(grid[0] * grid[1], REDUCERS * multiprocessors(w.norm.device))
        self._launch = Launch("recur", w.norm.device, grid, 4 * RECUR_CHANNELS, macros, shared[groups - 1])

    @staticmethod
    def takes(w: Mamba1Weights) -> bool:
        """Whether the kernel is made for these sizes."""
        (channels, states), rank = w.A_log.shape, w.dt_proj.weight.shape[1]
        return states == RECUR_STATES and channels % RECUR_CHANNELS == 0 and rank <= RECUR_RANK

    def __call__(
        self,
        x: Tensor,
        z: Tensor,
        selected: Tensor,
        state: Tensor,
        y: Tensor,
        told: Tensor | None = None,
        epoch: Tensor | None = None,
    ) -> None:
        """x, z and y [rows channels], selected [rows rank + 2 states] float32, or [sums ..]; the state is overwritten.

        Blocks tell each other the sums of the sums in `told` [rows rank + 2 states 2] int32; no two epochs are alike.
        """
        w = self._w
        self._launch(
            *(x, x.stride(0), z, z.stride(0), selected, selected.stride(-2), w.dt_proj.weight, w.dt_bias),
            *(*self._norms, w.A_log, w.D, state, y, y.stride(0), w.dt_proj.weight.shape[0], told, epoch),
        )
