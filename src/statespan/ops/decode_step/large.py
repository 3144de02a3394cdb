"""How `large.cu` and `settle.cu` are compiled and divided: products of many rows on Hopper, and what stands between."""

from importlib import import_module
from math import ceil
from typing import Any

import torch
from torch import Tensor

from statespan.ops.decode_step.launch import Launch
from statespan.ops.decode_step.project import TYPES, Convolved, Normed
from statespan.ops.gpu import multiprocessors, shared_memory

PART = 64  # inputs of a stage, and of a tile of x
TILES = (16, 32, 40, 64, 80)  # outputs of a block, for which large.cu has products
SPLITS = (1, 2, 3, 4, 6, 8)  # parts of the inputs
SPARE_BYTES = 4 << 10  # of shared memory, for barriers, taps and alignment
NEXT_BYTES = 64 << 10  # of shared memory, left for a block of the kernel before or after
NEXT_BYTES_OF_IN = {64: 4 << 10, 128: 40 << 10}  # of in_proj, by rows of a tile: whose states should not come earlier
PACE = 2  # stages of weights on the way before the wait for the kernel before


def tile_rows(rows: int) -> int:
    """Rows of a tile of x, and of a block."""
    return 64 if rows <= 64 else 128


def tiles(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for x: [blocks of rows][size / 64][rows of a tile][64], with the 16-byte pieces of a row permuted."""
    of_tile = tile_rows(rows)
    return torch.zeros(ceil(rows / of_tile) * of_tile, size, dtype=dtype, device=device)


def division(outputs: int, inputs: int, rows: int, device: torch.device, *, split: bool) -> tuple[int, int]:
    """Outputs of a block and parts of the inputs, by the bytes that pass through the busiest multiprocessor."""

    def cost(choice: tuple[int, int]) -> int:
        tile, parts = choice
        rounds = ceil(ceil(outputs / tile) * parts / multiprocessors(device))
        left = 4 * tile * tile_rows(rows) if parts > 1 else 0
        return rounds * (2 * (tile + tile_rows(rows)) * ceil(inputs / PART / parts) * PART + left)

    return min(((tile, parts) for tile in TILES for parts in (SPLITS if split else SPLITS[:1])), key=cost)


def end_bytes(tile: int, of_tile: int, selected: int) -> int:
    """Of the ring's memory, that a block uses once its products are done: its sums, and x_proj's two factors."""
    deep = ceil(tile / 32)
    line = 64 * deep + (0 if deep % 2 else 64)
    return of_tile * 4 * (tile + 8) + (of_tile + selected) * line


class Large:
    """y = W x of projections that are built alike, see large.cu: one call for each."""

    def __init__(self, weights: list[Tensor], rows: int, conv: Convolved | None = None, selected: int = 0) -> None:
        """y is what `conv` leaves, [rows outputs] in the weights' dtype; else sums [split rows outputs] in float32.

        `selected`: of x_proj's outputs, that many, sums over the channels of each block are left too.
        """
        weight = weights[0]
        self._outputs, inputs = weight.shape
        device, of_tile = weight.device, tile_rows(rows)
        tile, self.split = division(self._outputs, inputs, rows, device, split=conv is None)
        stage = 2 * PART * (tile + of_tile)
        room = shared_memory(device) - SPARE_BYTES - (NEXT_BYTES_OF_IN[of_tile] if conv else NEXT_BYTES)
        stages = min(room // stage, ceil(inputs / PART / self.split))
        if conv is not None:
            self.sums = ceil(conv.weight.shape[0] / tile)
            stages = max(stages, ceil(end_bytes(tile, of_tile, selected) / stage))
        shares = 2 if conv is not None and of_tile == 64 and tile // 2 in TILES else 1
        macros: dict[str, str | int] = {
            **{"W": TYPES[weight.dtype], "INPUTS": inputs, "TILE": tile, "ROWS": of_tile, "BATCH": rows},
            **{"SPLIT": self.split, "STAGES": stages, "OUTPUT": int(conv is not None)},
            **{
                "S": TYPES[conv.state_dtype] if conv else "bfloat16",
                "P": TYPES[conv.weight.dtype] if conv else "float",
            },
            **{"TAPS": conv.weight.shape[1] if conv else 1, "SELECTED": selected, "SHARES": shares, "PACE": PACE},
        }
        grid = (ceil(self._outputs / tile) * self.split, ceil(rows / of_tile))
        shared = stages * stage + SPARE_BYTES
        self._maps = torch.stack([tensor_map(one, tile) for one in weights]).to(device)
        self._weights = weights  # the maps know only where they are
        self._launch = Launch("large", device, grid, 2 * of_tile * shares + 32, macros, shared, own_instructions=True)

    def __call__(
        self,
        number: int,
        x: Tensor,
        y: Tensor,
        window: Tensor | None = None,
        conv_weight: Tensor | None = None,
        conv_bias: Tensor | None = None,
        x_proj: Tensor | None = None,
        selection: Tensor | None = None,
    ) -> None:
        """The product with the weight of that number; x lies in `tiles`. selection: [sums rows selected] float32."""
        channels = 0 if conv_weight is None else conv_weight.shape[0]
        of_conv = window, conv_weight, conv_bias, channels
        self._launch(self._maps[number], x, y, self._outputs, *of_conv, x_proj, selection)


class Settle:
    """The residual stream and its norm after `split` sums, see settle.cu."""

    def __init__(self, norm: Normed, rows: int, hidden_dtype: torch.dtype, split: int, *, normed: bool = True) -> None:
        size, dtype = norm.weight.shape[0], TYPES[norm.weight.dtype]
        macros: dict[str, str | int] = {
            **{
                "H": TYPES[hidden_dtype],
                "P": dtype,
                "W": dtype,
                "INPUTS": size,
                "BATCH": rows,
                "ROWS": tile_rows(rows),
            },
            **{"SPLIT": split, "NORMED": int(normed), "EPSILON": f"{norm.epsilon:.9e}f"},
        }
        self._launch = Launch("settle", norm.weight.device, (rows, 1), min(1024, ceil(size / 128) * 32), macros)

    def __call__(self, hidden: Tensor, sums: Tensor | None, norm: Tensor, normed: Tensor, epoch: Tensor) -> None:
        """hidden [rows h] += sums [split rows h]; its norm goes to `normed`, in `tiles`; epoch [1] int32 += 1."""
        self._launch(hidden, hidden.stride(0), sums, norm, normed, epoch)


def tensor_map(weight: Tensor, tile: int) -> Tensor:
    """What the copy engine needs to bring `tile` rows of 64 numbers, their 16-byte pieces permuted: 128 bytes."""
    driver: Any = import_module("cuda.bindings.driver")
    kinds = driver.CUtensorMapDataType
    outputs, inputs = weight.shape
    error, found = driver.cuTensorMapEncodeTiled(
        kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        if weight.dtype == torch.bfloat16
        else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        2,
        weight.data_ptr(),
        [driver.cuuint64_t(inputs), driver.cuuint64_t(outputs)],
        [driver.cuuint64_t(2 * inputs)],
        [driver.cuuint32_t(PART), driver.cuuint32_t(tile)],
        [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuTensorMapEncodeTiled: {error}")
    return torch.tensor([int(word) for word in found.opaque], dtype=torch.uint64).view(torch.int64)
