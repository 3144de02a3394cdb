"""The causal depthwise convolution on NVIDIA GPUs: tensors to the kernels of `forward.cu` and `backward.cu`."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from statespan.ops.cuda_kernels import Kernel, Launch, address, scalar_type
from statespan.ops.gpu import multiprocessors
from statespan.ops.layout import contiguous, contiguous_float32, last_contiguous
from statespan.ops.segments import signed_numbers

CHANNELS, AHEAD = 64, 8  # of a warp, and tokens that it has on their way
WARPS = 4  # of a block
SUMMING = 8  # warps of a block that adds strips' parts
STEP, SHORTEST = 16, 32  # tokens that a strip is a multiple of, and that it has at the least
START = 64  # what a strip costs beside its tokens, in tokens
MOST_INNER = 192  # columns of what goes through a matrix
MOST_ROW = 2**27  # numbers from one token to the next: offsets within AHEAD tokens have 32 bits
NARROW = (torch.bfloat16, torch.float16)


_HERE = Path(__file__).parent
_forward = Kernel(_HERE / "forward.cu", "conv_forward")
_backward = Kernel(_HERE / "backward.cu", "conv_backward")
_sums = Kernel(_HERE / "backward.cu", "conv_sums")


class Layout(NamedTuple):
    """What the compiled kernels and the division of the work depend on."""

    device: torch.device
    size: tuple[int, ...]  # batch, length, channels
    dtype: torch.dtype
    taps: int
    rows: tuple[int, ...]  # numbers from one token to the next, of x, and for the backward of both gradients
    biased: bool
    silu: bool
    segments: torch.dtype | None
    initial: bool
    aligned: bool  # whether pairs of channels lie at multiples of their size
    inner: int = 0  # columns of what goes through a matrix to the output's gradient
    weights: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)  # of taps and bias, in the forward

    @property
    def blocks(self) -> int:
        """Blocks of WARPS that a multiprocessor holds: what registers allow."""
        if self.taps > 4:
            return 2
        return 6 if len(self.rows) == 1 else 4

    @property
    def macros(self) -> tuple[tuple[str, int | str], ...]:
        """What the kernels are compiled with."""
        found: dict[str, int | str] = {
            **{"TYPE": scalar_type(self.dtype), "WIDTH": self.size[2], "TAPS": self.taps, "WARPS": WARPS},
            **{"SEGMENT": "int" if self.segments == torch.int32 else "i64", "SEGMENTS": int(self.segments is not None)},
            **{"HAS_INITIAL": int(self.initial), "ALIGNED": int(self.aligned), "HAS_BIAS": int(self.biased)},
            **{"SILU": int(self.silu), "BLOCKS": self.blocks, "AHEAD": AHEAD, "X_ROW": self.rows[0]},
        }
        if len(self.rows) == 1:
            weight, bias = map(scalar_type, self.weights)
            found |= {"WEIGHT": weight, "OFFSET": bias}
        else:
            found |= {"Y_ROW": self.rows[1], "GRAD_ROW": self.rows[2], "INNER": self.inner, "SUMMING": SUMMING}
        return tuple(found.items())


class Plan(NamedTuple):
    """Launches, and how a row is divided."""

    walk: Launch
    sums: Launch | None
    strip: int  # tokens
    strips: int


@lru_cache(maxsize=1024)
def _plan(layout: Layout) -> Plan:
    """Strips so that the blocks that run at once are soonest done."""
    batch, length, channels = layout.size
    lanes = -(-channels // CHANNELS)
    at_once = layout.blocks * multiprocessors(layout.device)

    def tokens(blocks: int) -> int:
        return -(-length // (blocks * WARPS * STEP)) * STEP

    def rounds(blocks: int) -> int:
        return -(-batch * lanes * blocks // at_once)

    most = max(1, length // (SHORTEST * WARPS))
    blocks = min(range(1, most + 1), key=lambda blocks: rounds(blocks) * (tokens(blocks) + START))
    kernel = _forward if len(layout.rows) == 1 else _backward
    launch = kernel.launch(layout.device, (lanes, blocks, batch), 32 * WARPS, layout.macros)
    sums = None
    if kernel is _backward:
        columns = channels * (layout.taps + layout.biased)
        sums = _sums.launch(layout.device, (-(-columns // 32), 1, 1), 32 * SUMMING, layout.macros)
    return Plan(launch, sums, tokens(blocks), -(-length // tokens(blocks)))


def takes_product(x: Tensor, weight: Tensor, matrix: Tensor) -> bool:
    """Whether `backward` multiplies by the matrix [i d] behind the conv of x [b t d] with taps [d k]."""
    inner, channels = matrix.shape
    kinds = x.dtype == matrix.dtype == torch.bfloat16
    sizes = channels % CHANNELS == 0 and inner % 16 == 0 and inner <= MOST_INNER and weight.shape[1] <= 4
    return kinds and sizes and matrix.data_ptr() % 16 == 0


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`."""
    (batch, _, channels), taps = x.shape, weight.shape[1]
    y, final_state = x.new_empty(x.shape), x.new_empty(batch, taps - 1, channels)
    if y.numel() == 0:
        return y, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    x = _rows(x)
    weight, bias, initial_state = _plain(weight), None if bias is None else _plain(bias), contiguous(initial_state)
    segments = signed_numbers(segments)
    weights = weight.dtype, torch.float32 if bias is None else bias.dtype
    layout = _layout((x,), weight, bias, initial_state, None, segments, silu)
    plan = _plan(layout._replace(weights=weights))
    plan.walk(
        *(address(x), x.stride(0), address(weight), address(bias), address(initial_state), address(segments)),
        *(address(y), address(final_state), x.shape[1], plan.strip),
    )
    return y, final_state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    into: Tensor | None = None,
    through: Tensor | None = None,
    matrix: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (in `into`, where it is given; its rows may be strided), weight, bias and initial_state.

    That of y is grad_y, or grad_y + through [b t i] @ matrix [i d].
    """
    (batch, length, channels), taps = x.shape, weight.shape[1]
    grad_x = x.new_empty(x.shape) if into is None else into
    grad_initial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if grad_x.numel() == 0:
        if grad_initial is not None:
            grad_initial.zero_() if grad_final_state is None else grad_initial.copy_(grad_final_state)
        return grad_x, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), grad_initial
    x, grad_y, wide = _rows(x), _rows(grad_y), contiguous_float32(weight)
    offsets, initial_state, segments = contiguous_float32(bias), contiguous(initial_state), signed_numbers(segments)
    through, matrix, grad_final_state = contiguous(through), contiguous(matrix), contiguous(grad_final_state)
    inner = 0 if matrix is None else matrix.shape[0]
    layout = _layout((x, grad_y, grad_x), wide, offsets, initial_state, grad_final_state, segments, silu, inner)
    plan = _plan(layout)
    assert plan.sums is not None  # of a backward
    columns = channels * (taps + layout.biased)
    parts = x.new_empty(batch * plan.strips, columns, dtype=torch.float32)
    plan.walk(
        *(address(grad_y), grad_y.stride(0), address(through), address(matrix), address(x), x.stride(0)),
        *(address(wide), address(offsets), address(initial_state), address(grad_final_state), address(segments)),
        *(address(grad_x), grad_x.stride(0), address(grad_initial), address(parts), length, plan.strip),
    )
    of_weight = x.new_empty(weight.shape, dtype=torch.float32)
    of_bias = None if bias is None else x.new_empty(channels, dtype=torch.float32)
    plan.sums(address(parts), address(of_weight), address(of_bias), parts.shape[0], columns, of_weight.numel())
    return (
        grad_x,
        of_weight.to(weight.dtype),
        None if bias is None or of_bias is None else of_bias.to(bias.dtype),
        grad_initial,
    )


def _layout(
    strided: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    grad_final_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    inner: int = 0,
) -> Layout:
    x = strided[0]
    steps, size = x.shape[2], x.element_size()
    for tensor in (*strided, initial_state, grad_final_state):
        if tensor is not None:
            steps |= tensor.data_ptr() // size | tensor.stride(0) | tensor.stride(1)
    rows = tuple(tensor.stride(1) for tensor in strided)
    marks = None if segments is None else segments.dtype
    kind = (weight.shape[1], rows, bias is not None, silu, marks, initial_state is not None, steps % 2 == 0, inner)
    return Layout(x.device, tuple(x.shape), x.dtype, *kind)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with contiguous channels, and its tokens close enough."""
    return last_contiguous(tensor) if tensor.stride(1) < MOST_ROW else tensor.contiguous()


def _plain(weight: Tensor) -> Tensor:
    """Without gaps, in a dtype that the forward reads: a cast would be a launch."""
    return weight.contiguous() if weight.dtype in NARROW else contiguous_float32(weight)
