"""The causal depthwise convolution on the CPU: tensors to the kernels of `cpu_kernels.py`."""

import torch
from torch import Tensor

from statespan.ops.layout import contiguous, contiguous_float32, last_contiguous
from statespan.ops.numba_kernels import Kernel, num_workers, scratch

_MODULE = "statespan.ops.causal_conv1d.cpu_kernels"
_forward = Kernel(
    _MODULE,
    "forward",
    "x weight bias initial_state zero_row segments y final_state windows length channels taps block"
    " x_batch_stride x_stride silu bf16",
)
_backward = Kernel(
    _MODULE,
    "backward",
    "grad_y grad_final_state x weight mirrored bias initial_state zero_row segments grad_x grad_weight grad_bias"
    " grad_initial_state windows slope_rows length channels taps block grad_batch_stride grad_stride"
    " x_batch_stride x_stride silu bf16",
)
_update = Kernel(
    _MODULE,
    "update",
    "state x weight bias y next_state channels taps x_stride bf16 weight_bf16 silu",
)

AT_ONCE = 4  # tokens that the kernels take together
ALONE = 1 << 15  # values that one thread has updated before another is awake
BF16 = torch.bfloat16


def _blocks(batch: int, channels: int) -> tuple[int, int]:
    """How many blocks of channels and their size: two work items for each thread, within 128 to 768 channels.

    Long rows read memory best; beyond 768 channels the window and the sums outgrow the first-level cache. Each channel
    is summed within one item, so the blocks do not change the results.
    """
    wanted = batch * channels // (2 * torch.get_num_threads())
    block = max(128, min(768, (wanted + 63) // 64 * 64))
    return -(-channels // block), block


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    x = last_contiguous(x)
    y, final_state = torch.empty(x.shape, dtype=x.dtype), torch.empty(batch, taps - 1, channels, dtype=x.dtype)
    num_blocks, block = _blocks(batch, channels)
    workers = num_workers(batch * num_blocks)
    _forward(
        batch * num_blocks,
        workers=workers,
        x=x,
        weight=weight.t().to(torch.float32).contiguous(),
        bias=contiguous_float32(bias),
        initial_state=contiguous(initial_state),
        zero_row=torch.zeros(block),
        segments=None if segments is None else segments.to(torch.int64).contiguous(),
        y=y,
        final_state=final_state,
        windows=scratch(workers, 2 * (taps + 2 * AT_ONCE)),
        length=length,
        channels=channels,
        taps=taps,
        block=block,
        x_batch_stride=x.stride(0),
        x_stride=x.stride(1),
        bf16=x.dtype is BF16,
        silu=silu,
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and initial_state."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    x, grad_y = last_contiguous(x), last_contiguous(grad_y)
    num_blocks, block = _blocks(batch, channels)
    workers = num_workers(batch * num_blocks)
    transposed = weight.t().to(torch.float32).contiguous()
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight, grad_bias = torch.empty(batch, taps, channels), torch.empty(batch, channels)
    grad_initial_state = None if initial_state is None else torch.empty(initial_state.shape, dtype=x.dtype)
    _backward(
        batch * num_blocks,
        workers=workers,
        grad_y=grad_y,
        grad_final_state=grad_final_state.contiguous(),
        x=x,
        weight=transposed,
        mirrored=transposed.flip(0),
        bias=contiguous_float32(bias),
        initial_state=contiguous(initial_state),
        zero_row=torch.zeros(block),
        segments=None if segments is None else segments.to(torch.int64).contiguous(),
        grad_x=grad_x,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_initial_state=grad_initial_state,
        windows=scratch(workers, 2 * (3 * (2 * taps + AT_ONCE) + 8)),
        slope_rows=scratch(workers, (taps - 1 + AT_ONCE) * block),
        length=length,
        channels=channels,
        taps=taps,
        block=block,
        grad_batch_stride=grad_y.stride(0),
        grad_stride=grad_y.stride(1),
        x_batch_stride=x.stride(0),
        x_stride=x.stride(1),
        bf16=x.dtype is BF16,
        silu=silu,
    )
    bias_gradient = None if bias is None else grad_bias.sum(0).to(bias.dtype)
    return grad_x, grad_weight.sum(0).t().to(weight.dtype).contiguous(), bias_gradient, grad_initial_state


def update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the next window of `statespan.ops.causal_conv1d_update`."""
    state = (state if state.dtype is x.dtype else state.to(x.dtype)).contiguous()
    x, weight = last_contiguous(x), weight.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype is weight.dtype else bias.to(weight.dtype)).contiguous()
    batch, channels = x.shape
    y, next_state = x.new_empty(x.shape), torch.empty_like(state)
    _update.launch(
        batch,
        1 if x.numel() < ALONE else num_workers(batch),
        state.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        next_state.data_ptr(),
        channels,
        weight.shape[1],
        x.stride(0),
        x.dtype is BF16,
        weight.dtype is BF16,
        silu,
    )
    return y, next_state
