"""Cross entropy of a linear head by its formula, with all logits at once: the truth the other backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, reduction: str, valid_vocab_size: int
) -> Tensor:
    """The loss of `statespan.ops.linear_cross_entropy`, differentiable by autograd."""
    logits = F.linear(hidden, weight[:valid_vocab_size]).to(torch.promote_types(hidden.dtype, torch.float32))
    counts = labels != ignore_index
    picked = logits.gather(-1, torch.where(counts, labels, 0)[..., None])[..., 0]
    loss = torch.where(counts, logits.logsumexp(-1) - picked, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / counts.sum().clamp(min=1) if reduction == "mean" else loss.sum()
