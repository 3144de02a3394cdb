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
    return None if tensor is None else tensor.to(product_dtype(tensor))


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which `autocast` gives a weight to a product."""
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(weight.device.type):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)
