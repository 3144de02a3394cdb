"""Matrix products with few rows on the CPU: tensors to the kernels of `cpu_kernels.py`."""

import torch
from torch import Tensor

from statespan.ops.layout import contiguous_float32
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
FLOAT32, BFLOAT16, INT8 = 0, 1, 2  # kinds of weights
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.int8: INT8}


def rows_per_item(weight: Tensor) -> int:
    """Rows of a matrix [.. o i] that a work item streams."""
    outputs, inputs = weight.shape[-2:]
    return max(1, min(ITEM_BYTES // (inputs * weight.element_size()), outputs // ITEMS))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """y of `statespan.ops.linear`."""
    outputs, inputs = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    outputs_per_item = rows_per_item(weight)
    num_items = (outputs + outputs_per_item - 1) // outputs_per_item
    x = contiguous_float32(x)
    bias = contiguous_float32(bias)
    scale = contiguous_float32(scale)
    _KERNELS[weight.dtype].launch(
        num_items,
        1 if weight.nbytes < ALONE_BYTES else num_workers(num_items),
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
