"""Cross entropy of a linear head where a chunk's logits are replaced by their gradient: one buffer, one kernel.

Only matrix products and the kernel of a backend touch a chunk: the logits are written, read for the softmax, replaced
by their gradient, and read by the two products that follow.
"""

from typing import Protocol

import torch
from torch import Tensor

from statespan.ops.linear import add_product, set_product
from statespan.ops.linear_cross_entropy.chunked import chunks

COLUMNS = 8  # cuBLAS has its fast products for multiples of 8 columns only: 4 times as fast at 50,277 of them
ALIGNMENT = 64  # columns; rows of logits start where both the products and the kernels read them best


class ChunkKernel(Protocol):
    """A backend's part."""

    def __call__(
        self, logits: Tensor, labels: Tensor, scale: Tensor | None, valid_vocab_size: int, gradients: bool
    ) -> Tensor:
        """The losses [t] float32 of logits [t v], where columns from valid_vocab_size on do not count.

        With `gradients` the logits become scale_t * (softmax - onehot), zero in columns that do not count. On a GPU a
        negative label counts for nothing (loss and gradients 0), and one beyond the vocabulary gives NaN.
        """
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
    weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked.losses_and_gradients`, by the kernel; `logit_bytes` is the most of one chunk's logits."""
    if hidden.is_cuda:
        # Nothing waits for the device: tokens that do not count are computed too.
        counted = torch.arange(labels.shape[0])
        labels = torch.where(labels == ignore_index, -1, torch.where(labels < 0, valid_vocab_size, labels))
    else:
        counted = (labels != ignore_index).nonzero()[:, 0]
    all_count = counted.shape[0] == labels.shape[0]
    losses = hidden.new_zeros(labels.shape, dtype=torch.float32)
    grad_hidden = (hidden.new_empty if all_count else hidden.new_zeros)(hidden.shape if need_hidden else 0)
    head = _head(weight, valid_vocab_size)
    rows = head.shape[0]
    width = -(-rows // ALIGNMENT) * ALIGNMENT
    parts = chunks(counted, width * hidden.element_size(), logit_bytes)
    grad_weight = weight.new_empty(0)
    if need_weight:
        # Only a sum over chunks needs more than the product's own rounding.
        shape = (max(rows, weight.shape[0]), weight.shape[1])
        grad_weight = weight.new_empty(shape, dtype=torch.float32 if len(parts) > 1 else weight_dtype or weight.dtype)
        grad_weight[rows if parts else 0 :] = 0
    grad_head = grad_weight[:rows]

    def over_chunks() -> None:  # a function, so that the logits are gone before the result is cast
        most = max(map(len, parts), default=0)
        buffer = hidden.new_empty(most, width)
        buffer[:, rows:] = 0  # oneDNN's bfloat16 products read them, and a NaN there would spread
        for number, tokens in enumerate(parts):
            # Neighbouring tokens need no copy.
            start = number * most
            place = slice(start, start + len(tokens)) if all_count else tokens
            inputs, logits = hidden[place], buffer[: len(tokens), :rows]
            torch.mm(inputs, head.T, out=logits)
            scale = None if token_scale is None else token_scale[place].contiguous()
            losses[place] = kernel(logits, labels[place], scale, valid_vocab_size, need_hidden or need_weight)
            if need_hidden and all_count:
                torch.mm(logits, head, out=grad_hidden[place])
            elif need_hidden:
                grad_hidden[place] = logits @ head
            if need_weight:
                (set_product if number == 0 else add_product)(grad_head, logits.T, inputs)

    over_chunks()
    return losses, grad_hidden, grad_weight[: weight.shape[0]].to(weight_dtype or weight.dtype)


def _head(weight: Tensor, valid_vocab_size: int) -> Tensor:
    """The rows of weight that count, on a GPU with others up to a multiple of COLUMNS."""
    rows = -(-valid_vocab_size // COLUMNS) * COLUMNS
    if not weight.is_cuda or rows == valid_vocab_size:
        return weight[:valid_vocab_size]
    if weight.shape[0] >= rows:  # padding of the vocabulary serves: its logits do not count, whatever they are
        return weight[:rows]
    head = weight.new_zeros(rows, weight.shape[1])
    head[:valid_vocab_size] = weight[:valid_vocab_size]
    return head
