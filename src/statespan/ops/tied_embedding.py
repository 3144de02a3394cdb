"""An embedding whose matrix is the head's, too: on GPUs one tensor holds the gradient of both from the beginning."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from statespan.ops.arguments import needs_gradients
from statespan.ops.custom_op import traced
from statespan.ops.dispatch import BACKENDS


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight[ids], and the weight for one function, the head, that gives it a gradient which nobody else holds.

    Apart, the embedding's gradient is a matrix of zeros but for some rows, which autograd adds to the head's. Here, on
    a GPU with Triton, the rows are added to the head's gradient where it lies, in a fixed order.

    Args:
        ids: [..] int64 in [0, v). weight: [v h], float.

    Returns:
        [.. h] in weight.dtype, and [v h]: weight itself, or where gradients are wanted another view of it.

    Numerics: an id's gradients are summed in float32 and rounded once, with the head's.
    """
    kernels = BACKENDS["triton"].why_not(weight.device, (weight.dtype,)) is None
    plain = type(weight) in (Tensor, torch.nn.Parameter)  # kernels take addresses, which a DTensor has not
    if traced() or not kernels or not plain or not needs_gradients(weight):
        return F.embedding(ids, weight), weight
    rows, head = _TiedEmbedding.apply(ids, weight)
    return rows, head


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable hides the names
        ctx: Any, *gradients: Tensor
    ) -> tuple[None, Tensor]:
        from statespan.ops.triton_kernels.weights import add_rows  # imports Triton, so imported when it runs

        (ids,), (of_rows, of_head) = ctx.saved_tensors, gradients
        of_head = of_head.contiguous()
        add_rows(of_head, ids.flatten(), of_rows.flatten(0, -2).contiguous())
        return None, of_head
