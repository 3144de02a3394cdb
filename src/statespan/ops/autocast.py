"""What F.linear does with its arguments under autocast, for ops that autocast does not know."""

from typing import overload

import torch
from torch import Tensor


@overload
def autocast(tensor: Tensor) -> Tensor: ...
@overload
def autocast(tensor: Tensor | None) -> Tensor | None: ...
def autocast(tensor: Tensor | None) -> Tensor | None:
    """The tensor in the autocast dtype where autocast is on for its device; float64 and None stay as they are."""
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
