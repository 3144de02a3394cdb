"""The gradients of conv and SiLU inside Mamba-1's block on NVIDIA GPUs: tensors to the kernel of `in_block.cu`."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from statespan.ops.cuda_kernels import Kernel, Launch, address
from statespan.ops.gpu import multiprocessors
from statespan.ops.triton_kernels.weights import sum_of_parts

CHANNELS, TOKENS = 64, 16  # of a warp, and that it takes at a time
WARPS, BLOCKS = 4, 4  # of a block, and blocks that a multiprocessor holds
MOST_INNER = 192  # columns of what goes through the matrix

_backward = Kernel(Path(__file__).parent / "in_block.cu", "conv_backward")


def serves(x: Tensor, weight: Tensor, matrix: Tensor) -> bool:
    """Whether the kernel takes x [b t d], the taps [d k] and the matrix [i d] behind the conv."""
    inner, channels = matrix.shape
    kinds = x.dtype == matrix.dtype == torch.bfloat16
    sizes = channels % CHANNELS == 0 and inner % 16 == 0 and inner <= MOST_INNER and 2 <= weight.shape[1] <= 4
    aligned = x.data_ptr() % 4 == 0 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 and x.stride(2) == 1
    return kinds and sizes and aligned and x.numel() > 0


def macros_of(channels: int, inner: int, taps: int, biased: bool, rows: tuple[int, int]) -> tuple[tuple[str, int], ...]:
    """What the kernel is compiled with; `rows` are numbers from one token to the next, of x and of its gradient."""
    sizes = {"WIDTH": channels, "INNER": inner, "TAPS": taps, "HAS_BIAS": int(biased)}
    return tuple({**sizes, "X_ROW": rows[0], "GRAD_ROW": rows[1], "WARPS": WARPS, "BLOCKS": BLOCKS}.items())


@cache
def _plan(
    device: torch.device, size: tuple[int, ...], inner: int, taps: int, biased: bool, rows: tuple[int, int]
) -> tuple[Launch, int, int]:
    """The launch, strips of a row, and tokens of a strip: what is soonest done by the blocks that run at once."""
    batch, length, channels = size
    lanes, room = batch * channels // CHANNELS, BLOCKS * multiprocessors(device)

    def tokens(blocks: int) -> int:
        return -(-length // (blocks * WARPS * TOKENS)) * TOKENS

    most = max(1, length // (4 * TOKENS * WARPS))
    blocks = min(range(1, most + 1), key=lambda blocks: -(-lanes * blocks // room) * (tokens(blocks) + TOKENS))
    launch = _backward.launch(
        device, (channels // CHANNELS, blocks, batch), 32 * WARPS, macros_of(channels, inner, taps, biased, rows)
    )
    return launch, -(-length // tokens(blocks)), tokens(blocks)


def backward(
    grad_y: Tensor, through: Tensor, matrix: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the taps and the bias, that of x [b t d] into `into`; y's is grad_y + through [b t i] @ matrix.

    Rows of `into` may be strided, as those of x, by an even number.
    """
    (batch, length, channels), taps = x.shape, weight.shape[1]
    rows = (x.stride(1), into.stride(1))
    launch, strips, strip = _plan(x.device, tuple(x.shape), matrix.shape[0], taps, bias is not None, rows)
    parts = x.new_empty(batch * strips, channels * (taps + (bias is not None)), dtype=torch.float32)
    grad_y, through, matrix = grad_y.contiguous(), through.contiguous(), matrix.contiguous()
    wide = [None if value is None else value.float().contiguous() for value in (weight, bias)]
    launch(
        *(address(grad_y), address(through), address(matrix), address(x), x.stride(0)),
        *(address(wide[0]), address(wide[1]), address(into), into.stride(0), address(parts), length, strip),
    )
    of_weight, of_bias = x.new_empty(weight.shape, dtype=weight.dtype), None if bias is None else torch.empty_like(bias)
    sum_of_parts(parts, *(found for found in (of_weight, of_bias) if found is not None))
    return of_weight, of_bias
