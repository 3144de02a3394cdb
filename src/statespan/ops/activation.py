"""Activations of feed-forward layers, plain and gated."""

from torch import Tensor
from torch.nn import functional as F

PLAIN = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
GATED = {"geglu": F.gelu, "swiglu": F.silu}  # act(gate) * up (arXiv 2002.05202); gelu is the exact one
ACTIVATIONS = (*PLAIN, *GATED)


def activate(inner: Tensor, activation: str) -> Tensor:
    """The activation of `inner` [.. f]; a gated one takes [.. 2f], the gate first, and gives [.. f]."""
    if activation in GATED:
        gate, up = inner.chunk(2, dim=-1)
        return GATED[activation](gate) * up
    return PLAIN[activation](inner)
