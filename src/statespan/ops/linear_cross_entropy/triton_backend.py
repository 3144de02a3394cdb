# pyright: reportCallIssue=false
# A launch takes options, num_warps, that are no parameters of the kernel.
"""Cross entropy of a linear head on GPUs: a chunk's logits become their gradient where they lie.

The kernel reads a row twice for the softmax (the second time from the cache) and writes it once.
"""

import torch
from torch import Tensor

from statespan.ops.linear_cross_entropy import triton_kernels as kernels
from statespan.ops.triton_kernels import on

LOGIT_BYTES = 320 << 20  # of one chunk's logits, in the dtype of the products
BLOCK = 4096


def losses_and_gradients(logits: Tensor, labels: Tensor, scale: Tensor | None, gradients: bool) -> Tensor:
    """See `in_place.ChunkKernel`."""
    rows, vocab_size = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    with on(logits.device):
        kernels.losses_and_gradients[(rows,)](
            logits,
            labels,
            scale,
            losses,
            vocab_size,
            logits.stride(0),
            GRADIENTS=gradients,
            BLOCK=BLOCK,
            num_warps=16,
        )
    return losses
