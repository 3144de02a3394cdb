"""How tensors lie in memory when kernels are given their addresses."""

import torch
from torch import Tensor


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension; the outer strides stay."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, without gaps."""
    return (tensor if tensor.dtype is torch.float32 else tensor.to(torch.float32)).contiguous()
