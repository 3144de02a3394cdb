"""Least kept weights in PyTorch: the largest weights in order, as many as are needed."""

import torch
from torch import Tensor


def sampling_edge(weights: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """[n 1] of `statespan.ops.sampling_edge`."""
    edge = weights.new_zeros(len(weights), 1)
    if weights.numel() == 0:
        return edge
    # A GPU sorts all of them: nobody waits there for how many it takes.
    best = weights.sort(dim=-1, descending=True).values if weights.is_cuda else None
    if top_k is not None:
        edge = _top_k_edge(weights, top_k, best)
    if top_p is None:
        return edge
    if top_k is not None:
        weights = weights * (weights >= edge)
        best = None if best is None else best * (best >= edge)
    return torch.maximum(edge, _nucleus_edge(weights, top_p.unsqueeze(1), best))


def _top_k_edge(weights: Tensor, top_k: Tensor, best: Tensor | None) -> Tensor:
    """Weight [n 1] of each row's k-th best token; 0 where k is the vocabulary's size."""
    limited = top_k < weights.shape[-1]
    if best is None:
        best = weights.topk(max(1, int(top_k.where(limited, 0).max())), dim=-1).values
    edge = best.gather(-1, (top_k - 1).clamp(max=best.shape[-1] - 1).unsqueeze(1))
    return edge.where(limited.unsqueeze(1), edge.new_zeros(()))


def _nucleus_edge(weights: Tensor, top_p: Tensor, best: Tensor | None) -> Tensor:
    """Least weight [n 1] of the nucleus; 0 where top_p [n 1] is 1."""
    mass = weights.sum(dim=-1, keepdim=True)
    limited = top_p * mass < mass
    if best is None:
        # Tokens below this hold less than 1 - top_p together, so the nucleus is among the others, few to sort.
        candidates = (weights >= mass * (1 - top_p) / weights.shape[-1]) & limited
        best = weights.topk(max(1, int(candidates.sum(dim=-1).max())), dim=-1).values
    missing = (best.cumsum(dim=-1) < top_p * mass).sum(dim=-1, keepdim=True)  # tokens that do not reach top_p yet
    edge = best.gather(-1, missing.clamp(max=best.shape[-1] - 1))
    return edge.where(limited, edge.new_zeros(()))
