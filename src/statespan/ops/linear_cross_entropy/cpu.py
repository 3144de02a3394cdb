"""Cross entropy of a linear head on the CPU: a chunk's logits become their gradient where they lie."""

import torch
from torch import Tensor

from statespan.ops.layout import contiguous_float32
from statespan.ops.numba_kernels import Kernel

_kernel = Kernel(
    "statespan.ops.linear_cross_entropy.cpu_kernels",
    "losses_and_gradients",
    "logits labels scale sums differences vocab_size row_stride gradients bf16",
)


def losses_and_gradients(
    logits: Tensor, labels: Tensor, scale: Tensor | None, valid_vocab_size: int, gradients: bool
) -> Tensor:
    """See `in_place.ChunkKernel`."""
    rows = logits.shape[0]
    sums, differences = torch.empty(rows), torch.empty(rows)
    _kernel(
        rows,
        logits=logits,
        labels=labels.contiguous(),
        scale=contiguous_float32(scale),
        sums=sums,
        differences=differences,
        vocab_size=valid_vocab_size,
        row_stride=logits.stride(0),
        gradients=gradients,
        bf16=logits.dtype is torch.bfloat16,
    )
    return sums.log_().add_(differences)
