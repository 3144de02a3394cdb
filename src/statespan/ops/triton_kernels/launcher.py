"""A launch of a Triton kernel that is known from an earlier one."""

from typing import Any

import torch
from torch import Tensor

MOST = 4096  # launches that are remembered
HIP = torch.version.hip is not None  # where memory of less than 2 GiB has offsets of 32 bits in the machine code

_known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options), with tensors, numbers or None as arguments, the first of them a tensor.

    Triton chooses the machine code by the tensors' dtypes and alignment, for AMD by their sizes too, and by the other
    values, which takes the host 20 to 30 us; where all these were seen together before, only the launch itself is left.
    """
    key: list[Any] = [id(kernel), arguments[0].get_device(), *options.values()]  # kernels live as long as their modules
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            values.append(address)
            key.append(argument.dtype)
            key.append(address % 16 == 0)
            if HIP:
                key.append(argument.untyped_storage().nbytes() < 1 << 31)
        else:
            values.append(argument)
            key.append(argument if type(argument) is int else (type(argument), argument))  # 1 == 1.0 == True
    found = _known.get(tuple(key))
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*values, *constants)
        return
    compiled = start(kernel, grid, *arguments, **options)
    if compiled is None:  # interpreted
        return
    if len(_known) >= MOST:
        _known.clear()
    constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
    _known[tuple(key)] = compiled, constants


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """kernel[grid](*arguments, **options) with products and sums fused, as Triton 3.10 will not of its own accord."""
    return kernel[grid](*arguments, enable_fp_fusion=True, **options)
