"""RMS normalisation on the CPU: tensors to the kernels of `cpu_kernels.py`."""

import torch
from torch import Tensor

from statespan.ops.numba_kernels import Kernel, num_workers, scratch

_MODULE = "statespan.ops.rms_norm.cpu_kernels"
_forward = Kernel(
    _MODULE,
    "forward",
    "x residual weight y total num_rows rows_per_item channels x_stride residual_stride"
    " x_bf16 residual_bf16 weight_bf16 y_bf16",
    "eps",
)
_backward = Kernel(
    _MODULE,
    "backward",
    "grad_y grad_total x weight grad_x grad_weight num_rows rows_per_item channels"
    " grad_y_stride grad_total_stride x_stride grad_y_bf16 grad_total_bf16 x_bf16 weight_bf16",
    "eps",
)
_gated_forward = Kernel(
    _MODULE,
    "gated_forward",
    "x z weight y scratch num_rows rows_per_item channels group_size norm_before_gate"
    " x_stride z_stride scratch_stride x_bf16 z_bf16 weight_bf16",
    "eps",
)
_gated_backward = Kernel(
    _MODULE,
    "gated_backward",
    "grad_y x z weight grad_x grad_z grad_weight scratch num_rows rows_per_item channels group_size norm_before_gate"
    " grad_y_stride x_stride z_stride scratch_stride x_bf16 z_bf16 weight_bf16",
    "eps",
)

SMALL = 1 << 14  # elements: below, one thread is done before another wakes
BF16 = torch.bfloat16


def _rows(x: Tensor) -> Tensor:
    """x as [rows d] with contiguous channels; a view wherever the strides allow it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _items(rows: Tensor) -> tuple[int, int]:
    """Work items and rows of each. They depend on the shape alone: sums over items are the same with any threads."""
    num_rows, channels = rows.shape
    rows_per_item = max(1, SMALL // max(channels, 1), (num_rows + 127) // 128)
    return (num_rows + rows_per_item - 1) // rows_per_item, rows_per_item


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """y of `statespan.ops.rms_norm`."""
    y = x.new_empty(x.shape, dtype=dtype)
    _normalize(_rows(x), None, weight, y, None, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y and x + residual."""
    y, total = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=residual.dtype)
    _normalize(_rows(x), _rows(residual), weight, y, total, eps)
    return y, total


def _normalize(x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float) -> None:
    num_items, rows_per_item = _items(x)
    weight = weight.contiguous()
    _forward.launch(
        num_items,
        num_workers(num_items),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        0 if total is None else total.data_ptr(),
        x.shape[0],
        rows_per_item,
        x.shape[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        x.dtype is BF16,
        residual is not None and residual.dtype is BF16,
        weight.dtype is BF16,
        y.dtype is BF16,
        eps,
    )


def rms_norm_backward(
    grad_y: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with grad_total added, and weight."""
    shape, x, grad_y = x.shape, _rows(x), _rows(grad_y)
    grad_total = None if grad_total is None else _rows(grad_total)
    num_items, rows_per_item = _items(x)
    grad_x = torch.empty(shape, dtype=x.dtype)
    grad_weight = torch.empty(num_items, x.shape[1])
    _backward(
        num_items,
        grad_y=grad_y,
        grad_total=grad_total,
        x=x,
        weight=weight.contiguous(),
        grad_x=grad_x,
        grad_weight=grad_weight,
        num_rows=x.shape[0],
        rows_per_item=rows_per_item,
        channels=x.shape[1],
        grad_y_stride=grad_y.stride(0),
        grad_total_stride=0 if grad_total is None else grad_total.stride(0),
        x_stride=x.stride(0),
        grad_y_bf16=grad_y.dtype is BF16,
        grad_total_bf16=grad_total is not None and grad_total.dtype is BF16,
        x_bf16=x.dtype is BF16,
        weight_bf16=weight.dtype is BF16,
        eps=eps,
    )
    return grad_x, grad_weight.sum(0).to(weight.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    """y of `statespan.ops.gated_rms_norm`."""
    y = x.new_empty(x.shape)
    x, z, weight = _rows(x), _rows(z), weight.contiguous()
    num_items, rows_per_item = _items(x)
    workers = num_workers(num_items)
    memory = scratch(workers, group_size)
    _gated_forward.launch(
        num_items,
        workers,
        x.data_ptr(),
        z.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        memory.data_ptr(),
        x.shape[0],
        rows_per_item,
        x.shape[1],
        group_size,
        norm_before_gate,
        x.stride(0),
        z.stride(0),
        4 * memory.stride(0),
        x.dtype is BF16,
        z.dtype is BF16,
        weight.dtype is BF16,
        eps,
    )
    return y


def gated_rms_norm_backward(
    grad_y: Tensor, x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z and weight."""
    grad_x, grad_z = torch.empty(x.shape, dtype=x.dtype), torch.empty(z.shape, dtype=z.dtype)
    x, z, grad_y = _rows(x), _rows(z), _rows(grad_y)
    num_items, rows_per_item = _items(x)
    workers = num_workers(num_items)
    memory = scratch(workers, group_size)
    grad_weight = torch.empty(num_items, x.shape[1])
    _gated_backward(
        num_items,
        workers=workers,
        grad_y=grad_y,
        x=x,
        z=z,
        weight=weight.contiguous(),
        grad_x=grad_x,
        grad_z=grad_z,
        grad_weight=grad_weight,
        scratch=memory,
        num_rows=x.shape[0],
        rows_per_item=rows_per_item,
        channels=x.shape[1],
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        grad_y_stride=grad_y.stride(0),
        x_stride=x.stride(0),
        z_stride=z.stride(0),
        scratch_stride=4 * memory.stride(0),
        x_bf16=x.dtype is BF16,
        z_bf16=z.dtype is BF16,
        weight_bf16=weight.dtype is BF16,
        eps=eps,
    )
    return grad_x, grad_z, grad_weight.sum(0).to(weight.dtype)
