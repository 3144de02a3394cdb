"""Activation checkpointing: keep each block's input only, and run the block again in the backward."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(blocks: Iterable[nn.Module], enabled: bool = True) -> Generator[None]:
    """Inside, a forward of `blocks` keeps no activations but its inputs (arXiv 1604.06174); values do not change.

    The model's code and the names of its parameters know nothing of it, and afterwards the blocks are as before.
    """
    wrapped = list(blocks) if enabled else []
    for block in wrapped:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward  # the class's own forward shows again
