"""Activation checkpointing: keep each block's input only, and run the block again in the backward."""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statespan.layers.mixer import Mixer


@contextmanager
def recomputing(
    blocks: Iterable[nn.Module],
    enabled: bool = True,
    projections: float = 0.0,
    convolutions: float = 1.0,
    casts: float = 1.0,
) -> Generator[None]:
    """Inside, a forward of `blocks` keeps no activations but its inputs (arXiv 1604.06174); values do not change.

    The model's code and the names of its parameters know nothing of it, and afterwards the blocks are as before.

    Args:
        blocks: of a model.
        enabled: whether each block as a whole runs again in the backward.
        projections: share of the mixers, the first ones; Mamba's compute again what in_proj gave, where norm
            and mixer run as one op.
        convolutions: the same for what the conv gave, where in_proj's output is kept.
        casts: the same for the products' weights in the dtype of autocast.
    """
    blocks = list(blocks)
    wrapped = blocks if enabled else []
    mixers = [mixer for block in blocks if isinstance(mixer := block.mixer, Mixer)]
    for block in wrapped:
        block.forward = partial(_recomputed, block.forward)
    for place, mixer in enumerate(mixers):
        mixer.keep_projected = place >= round(projections * len(mixers))
        mixer.keep_convolved = place >= round(convolutions * len(mixers))
        mixer.keep_cast = place >= round(casts * len(mixers))
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward  # the class's own forward shows again
        for mixer in mixers:
            del mixer.keep_projected, mixer.keep_convolved, mixer.keep_cast


def _recomputed(forward: Callable[..., Any], hidden: Tensor, update: Tensor | None, *others: Any) -> Any:
    """The block on the sum of both parts of the stream, so that one tensor is kept and not two."""
    hidden = hidden if update is None else hidden + update
    # No layer draws random numbers, and their state cannot be read while a CUDA graph is captured.
    return checkpoint(forward, hidden, None, *others, use_reentrant=False, preserve_rng_state=False)
