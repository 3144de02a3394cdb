"""What the host asks of a GPU when it divides work; on the CPU, where Triton interprets, small answers."""

from functools import cache

import torch

GRID_ROWS = (1 << 16) - 1  # blocks of a grid in its second and third dimension


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs can run at once at the least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def hopper(device: torch.device) -> bool:
    """Whether its matrix units are Hopper's, which add up in registers; later ones do in a memory of their own."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 64 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
