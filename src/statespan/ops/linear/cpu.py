"""Matrix products with few rows on the CPU: tensors to the kernels of `cpu_kernels.py`."""

import torch
from torch import Tensor

from statespan.ops.numba_kernels import Kernel, num_workers

_ARGUMENTS = "x weight scale bias y rows inputs outputs outputs_per_item row_stride y_bf16"
_KERNELS = {
    dtype: Kernel("statespan.ops.linear.cpu_kernels", name, _ARGUMENTS)
    for dtype, name in (
        (torch.float32, "linear_float32"),
        (torch.bfloat16, "linear_bfloat16"),
        (torch.int8, "linear_int8"),
    )
}

ITEM_BYTES = 1 << 17  # most weights of a work item: long streams are read fastest
ITEMS = 16  # fewest work items of a matrix, so that no thread waits long for the last one
ALONE_BYTES = 1 << 17  # weights that one thread has read before another is awake


def _plain(x: Tensor) -> Tensor:
    """x contiguous in float32."""
    return (x if x.dtype is torch.float32 else x.to(torch.float32)).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """y of `statespan.ops.linear`."""
    outputs, inputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    row_bytes = inputs * weight.element_size()
    outputs_per_item = max(1, min(ITEM_BYTES // row_bytes, outputs // ITEMS))
    num_items = (outputs + outputs_per_item - 1) // outputs_per_item
    x = _plain(x)
    bias = None if bias is None else _plain(bias)
    scale = None if scale is None else _plain(scale)
    _KERNELS[weight.dtype].launch(
        num_items,
        1 if outputs * row_bytes < ALONE_BYTES else num_workers(num_items),
        x.data_ptr(),
        weight.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // inputs,
        inputs,
        outputs,
        outputs_per_item,
        weight.stride(0),
        y.dtype is torch.bfloat16,
    )
    return y
