"""Cross entropy of a linear head where a chunk's logits are replaced by their gradient: one buffer, one kernel.

Only matrix products and the kernel of a backend touch a chunk: the logits are written, read for the softmax, replaced
by their gradient, and read by the two products that follow.
"""

from typing import Protocol

import torch
from torch import Tensor

from statespan.ops.linear_cross_entropy.chunked import chunks

ALIGNMENT = 64  # columns; rows of logits start where both the products and the kernels read them best


class ChunkKernel(Protocol):
    """A backend's part."""

    def __call__(self, logits: Tensor, labels: Tensor, scale: Tensor | None, gradients: bool) -> Tensor:
        """The losses [t] float32 of logits [t v]; with `gradients` these become scale_t * (softmax - onehot)."""
        ...


def losses_and_gradients(
    kernel: ChunkKernel,
    logit_bytes: int,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    valid_vocab_size: int,
    token_scale: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.losses_and_gradients`, by the kernel; `logit_bytes` is the most of one chunk's logits."""
    counted = (labels != ignore_index).nonzero()[:, 0]
    all_count = counted.shape[0] == labels.shape[0]
    losses = hidden.new_zeros(labels.shape, dtype=torch.float32)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    width = -(-valid_vocab_size // ALIGNMENT) * ALIGNMENT
    parts = chunks(counted, width * hidden.element_size(), logit_bytes)
    head, grad_weight = weight[:valid_vocab_size], weight.new_empty(0)
    if need_weight:
        # Only a sum over chunks needs more than the product's own rounding, and zeros to begin with.
        grad_weight = weight.new_empty(weight.shape, dtype=torch.float32 if len(parts) > 1 else weight.dtype)
        grad_weight[valid_vocab_size if len(parts) == 1 else 0 :] = 0
    grad_head = grad_weight[:valid_vocab_size]

    def over_chunks() -> None:  # a function, so that the logits are gone before the result is cast
        most = max(map(len, parts), default=0)
        buffer = hidden.new_empty(most, width)
        buffer[:, valid_vocab_size:] = 0  # oneDNN's bfloat16 products read them, and a NaN there would spread
        for number, tokens in enumerate(parts):
            # Neighbouring tokens need no copy.
            start = number * most
            place = slice(start, start + len(tokens)) if all_count else tokens
            rows, logits = hidden[place], buffer[: len(tokens), :valid_vocab_size]
            torch.mm(rows, head.T, out=logits)
            scale = None if token_scale is None else token_scale[place].contiguous()
            losses[place] = kernel(logits, labels[place], scale, need_hidden or need_weight)
            if need_hidden:
                grad_hidden[place] = logits @ head
            if need_weight and len(parts) == 1:
                torch.mm(logits.T, rows, out=grad_head)
            elif need_weight:
                _add_product(grad_head, logits.T, rows)

    over_chunks()
    return losses, grad_hidden, grad_weight.to(weight.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the sum in total's float32."""
    if total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)
