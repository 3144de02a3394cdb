# pyright: reportCallIssue=false
# A launch takes options, num_warps, that are no parameters of the kernel.
"""Cross entropy of a linear head on GPUs: a chunk's logits become their gradient where they lie.

The kernel reads a row twice for the softmax (the second time from the cache) and writes it once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.ops.linear_cross_entropy import triton_kernels as kernels
from statespan.ops.triton_kernels import on
from statespan.ops.triton_kernels.launcher import launch
from statespan.ops.tuning import Tunable

LOGIT_BYTES = 320 << 20  # of one chunk's logits, in the dtype of the products


def losses_and_gradients(
    logits: Tensor, labels: Tensor, scale: Tensor | None, valid_vocab_size: int, gradients: bool
) -> Tensor:
    """See `in_place.ChunkKernel`."""
    rows = logits.shape[0]
    losses = logits.new_empty(rows, dtype=torch.float32)
    tuned = LOSS.best(logits.device, valid_vocab_size)
    with on(logits.device):
        launch(
            kernels.losses_and_gradients,
            (rows,),
            logits,
            labels,
            scale,
            losses,
            valid_vocab_size,
            logits.stride(0),
            GRADIENTS=gradients,
            BLOCK=tuned["block"],
            num_warps=tuned["warps"],
        )
    return losses


def _trial(device: torch.device, vocab_size: int) -> Callable[[], object]:
    width = -(-vocab_size // 64) * 64
    logits = torch.randn(2048, width, dtype=torch.bfloat16, device=device)[:, :vocab_size]
    labels = torch.randint(0, vocab_size, (2048,), device=device)
    return lambda: losses_and_gradients(logits, labels, None, vocab_size, True)


LOSS = Tunable(
    "linear_cross_entropy", (256, 50280, 131072), _trial, block=(256, 1024, 2048, 4096, 8192), warps=(4, 8, 16)
)
TUNABLES = (LOSS,)
