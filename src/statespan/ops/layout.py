"""How tensors lie in memory when kernels are given their addresses. None, an absent tensor, stays None."""

from typing import overload

import torch
from torch import Tensor

TOGETHER = 64  # tokens that a program of the Triton kernels looks at together, at the most


@overload
def last_contiguous(tensor: Tensor) -> Tensor: ...
@overload
def last_contiguous(tensor: Tensor | None) -> Tensor | None: ...
def last_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with a contiguous last dimension; the outer strides stay."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def near(tensor: Tensor) -> Tensor:
    """[b t g n] with a contiguous last dimension, whose offsets within TOGETHER tokens have 32 bits."""
    tokens, groups = min(tensor.shape[1], TOGETHER), tensor.shape[2]
    return (
        last_contiguous(tensor)
        if tokens * tensor.stride(1) + groups * tensor.stride(2) < 2**31
        else tensor.contiguous()
    )


@overload
def contiguous_float32(tensor: Tensor) -> Tensor: ...
@overload
def contiguous_float32(tensor: Tensor | None) -> Tensor | None: ...
def contiguous_float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float32, without gaps."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype is torch.float32 else tensor.to(torch.float32)).contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor without gaps."""
    return None if tensor is None else tensor.contiguous()
