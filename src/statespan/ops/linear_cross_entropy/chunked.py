"""Cross entropy of a linear head, some tokens at a time: the logits of one chunk live at once."""

import torch
from torch import Tensor

LOGIT_BYTES = 256 << 20  # of one chunk's logits in float32; twice that is held at once


def losses_and_gradients(
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
    """Each token's loss, and the gradients of sum(token_scale * loss).

    Args:
        hidden, weight, labels: [t h], [v h], [t]; ignore_index and valid_vocab_size as in
            `statespan.ops.linear_cross_entropy`.
        token_scale: [t], or None for ones.
        need_hidden, need_weight: which gradients are wanted; the others come back empty.
        weight_dtype: of weight's gradient, None for weight's; where weight was cast for autocast, the parameter's.

    Returns:
        losses [t] float32, and the gradients [t h] in hidden's dtype and [v h].
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counted = (labels != ignore_index).nonzero()[:, 0]
    losses = hidden.new_zeros(labels.shape, dtype=dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    parts = chunks(counted, 4 * valid_vocab_size, LOGIT_BYTES)
    # Only a sum over chunks needs more than the product's own rounding.
    grad_weight = weight.new_zeros(weight.shape if need_weight else 0, dtype=dtype if len(parts) > 1 else None)
    head, grad_head = weight[:valid_vocab_size], grad_weight[:valid_vocab_size]

    def add(tokens: Tensor) -> None:  # a function, so that its large tensors are gone before the next chunk's
        rows, targets = hidden[tokens], labels[tokens, None]
        logits = torch.log_softmax((rows @ head.T).to(dtype), dim=-1)
        losses[tokens] = -logits.gather(1, targets)[:, 0]
        if not (need_hidden or need_weight):
            return
        grad_logits = logits.exp_().scatter_add_(1, targets, logits.new_full(targets.shape, -1.0)).to(rows.dtype)
        scale = 1 if token_scale is None else token_scale[tokens, None]
        if need_hidden:
            grad_hidden[tokens] = ((grad_logits @ head) * scale).to(rows.dtype)
        if need_weight and rows.dtype == grad_head.dtype:
            grad_head.addmm_(grad_logits.T, (rows * scale).to(rows.dtype))
        elif need_weight:
            grad_head.add_(grad_logits.T @ (rows * scale).to(rows.dtype))

    for tokens in parts:
        add(tokens)
    return losses, grad_hidden, grad_weight.to(weight_dtype or weight.dtype)


def chunks(counted: Tensor, row_bytes: int, most_bytes: int) -> tuple[Tensor, ...]:
    """Places of tokens in equal parts, each with at most `most_bytes` of logits."""
    if counted.numel() == 0:
        return ()
    most = max(1, most_bytes // row_bytes)
    parts = -(-counted.numel() // most)
    return counted.split(-(-counted.numel() // parts))
