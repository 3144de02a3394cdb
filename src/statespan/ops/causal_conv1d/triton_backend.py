"""The causal depthwise convolution on GPUs: tensors to the kernels of `triton_kernels*.py`."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from statespan.ops.causal_conv1d import triton_kernels as kernels
from statespan.ops.causal_conv1d import triton_kernels_backward as backward_kernels
from statespan.ops.gpu import multiprocessors
from statespan.ops.layout import contiguous, last_contiguous
from statespan.ops.segments import signed_numbers
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.triton_kernels.launcher import launch
from statespan.ops.tuning import Tunable

SEARCH = 128  # tokens that are looked through at once for one that is no padding
WARPS = 1
SHORTEST = 16  # tokens of a strip, where there are few


def _block(channels: int) -> int:
    """Channels of a program: 8 bytes a thread and load in bfloat16."""
    return min(128 * WARPS, max(16, power_of_two(channels)))


@lru_cache(maxsize=1024)
def _strips(shape: torch.Size, device: torch.device, warps_at_once: int, longest: int) -> tuple[int, int]:
    """Strips of each row, and their tokens: whole waves of programs, as few as strips of at most `longest` allow.

    A last wave that is nearly empty costs as much as a full one.
    """
    batch, length, channels = shape
    wave = multiprocessors(device) * warps_at_once // WARPS
    lanes = batch * -(-channels // _block(channels))  # programs for one strip of each row
    waves = max(1, lanes * -(-length // longest) // wave)
    while lanes * -(-length // longest) > waves * wave:
        waves += 1
    strips = max(-(-length // longest), min(waves * wave // lanes, -(-length // SHORTEST)))
    strip = -(-length // strips)
    return -(-length // strip), strip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    y, final_state = x.new_empty(x.shape), x.new_empty(batch, taps - 1, channels)
    if y.numel() == 0:
        return y, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    x = last_contiguous(x)
    tuned = (FORWARD if segments is None else FORWARD_SEGMENTS).best(x.device, channels)
    strips, strip = _strips(x.shape, x.device, tuned["warps_at_once"], tuned["longest"])
    block = _block(channels)
    with on(x.device):
        launch(
            kernels.forward,
            (batch * strips * -(-channels // block),),
            x,
            weight,
            contiguous(bias),
            contiguous(initial_state),
            signed_numbers(segments),
            y,
            final_state,
            length,
            channels,
            strips,
            strip,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            weight.stride(1),
            SILU=silu,
            TAPS=taps,
            UNROLL=tuned["unroll"],
            BLOCK=block,
            SEARCH=SEARCH,
            SPAN=power_of_two(strip + 2 * (taps - 1)),
            num_warps=WARPS,
        )
    return y, final_state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (in `into`, where it is given; its rows may be strided), weight, bias and initial_state."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    grad_x = x.new_empty(x.shape) if into is None else into
    grad_initial_state = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    if grad_x.numel() == 0:
        if grad_initial_state is not None:
            grad_initial_state.copy_(grad_final_state)
        return grad_x, torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias), grad_initial_state
    x, grad_y = last_contiguous(x), last_contiguous(grad_y)
    tuned = (BACKWARD if segments is None else BACKWARD_SEGMENTS).best(x.device, channels)
    strips, strip = _strips(x.shape, x.device, tuned["warps_at_once"], tuned["longest"])
    block = _block(channels)
    parts = x.new_empty(batch * strips, taps + 1, channels, dtype=torch.float32)
    with on(x.device):
        launch(
            backward_kernels.backward,
            (batch * strips * -(-channels // block),),
            grad_y,
            grad_final_state.contiguous(),
            x,
            weight,
            contiguous(bias),
            contiguous(initial_state),
            signed_numbers(segments),
            grad_x,
            parts,
            grad_initial_state,
            length,
            channels,
            strips,
            strip,
            grad_y.stride(0),
            grad_y.stride(1),
            x.stride(0),
            x.stride(1),
            grad_x.stride(0),
            grad_x.stride(1),
            weight.stride(0),
            weight.stride(1),
            SILU=silu,
            TAPS=taps,
            UNROLL=tuned["unroll"],
            BLOCK=block,
            SEARCH=SEARCH,
            SPAN=power_of_two(strip + 2 * (taps - 1)),
            num_warps=WARPS,
        )
    total = parts.sum(0)
    grad_bias = None if bias is None else total[taps].to(bias.dtype, copy=True)
    return grad_x, total[:taps].t().to(weight.dtype).contiguous(), grad_bias, grad_initial_state


def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the next window of `statespan.ops.causal_conv1d_update`."""
    state, x = state.to(x.dtype).contiguous(), last_contiguous(x)
    batch, channels = x.shape
    y, next_state = x.new_empty(x.shape), torch.empty_like(state)
    if y.numel() == 0:
        return y, next_state
    block = _block(channels)
    with on(x.device):
        launch(
            kernels.update,
            (batch * -(-channels // block),),
            state,
            x,
            weight,
            contiguous(bias),
            y,
            next_state,
            channels,
            x.stride(0),
            weight.stride(0),
            weight.stride(1),
            SILU=silu,
            TAPS=weight.shape[1],
            BLOCK=block,
            num_warps=WARPS,
        )
    return y, next_state


def _trial(backwards: bool, documents: bool) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, channels: int) -> Callable[[], object]:
        x, grad = (torch.randn(8, 2048, channels, dtype=torch.bfloat16, device=device) for _ in range(2))
        weight, bias = torch.randn(channels, 4, device=device), torch.randn(channels, device=device)
        segments = (torch.arange(2048, device=device) // 500).expand(8, -1).contiguous() if documents else None
        if backwards:
            return lambda: backward(grad, grad[:, :3], x, weight, bias, None, segments, True)
        return lambda: forward(x, weight, bias, None, segments, True)

    return trial


# Tokens whose loads are in flight at once, warps that a multiprocessor holds, and tokens of the longest strip.
_CHOICES = {"unroll": (4, 8), "warps_at_once": (8, 14, 24), "longest": (64, 200, 300)}
_SIZES = (1536, 5120)
FORWARD = Tunable("causal_conv1d.forward", _SIZES, _trial(False, False), **_CHOICES)
FORWARD_SEGMENTS = Tunable("causal_conv1d.forward_segments", _SIZES, _trial(False, True), **_CHOICES)
BACKWARD = Tunable("causal_conv1d.backward", _SIZES, _trial(True, False), **_CHOICES)
BACKWARD_SEGMENTS = Tunable("causal_conv1d.backward_segments", _SIZES, _trial(True, True), **_CHOICES)
TUNABLES = (FORWARD, FORWARD_SEGMENTS, BACKWARD, BACKWARD_SEGMENTS)
