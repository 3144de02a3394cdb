"""The next token of each row, where every row has its own way of sampling. Vector form of generation/sampling.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.generation.sampling import Sampling, pick


@dataclass(frozen=True)
class RowSampling:
    """The options of n rows as tensors on one device. Rows are in the order of the logits."""

    temperature: Tensor  # [n] float32; 1 for greedy rows
    top_k: Tensor  # [n] int64; the vocabulary's size: all
    top_p: Tensor  # [n] float32; 1: all
    min_p: Tensor  # [n] float32; 0: all
    greedy: Tensor  # [n] bool: no chance is involved
    all_greedy: bool
    filters: tuple[bool, bool, bool]  # whether any row uses top_k, top_p, min_p

    @classmethod
    def of(cls, rows: Sequence[Sampling], vocab_size: int, device: torch.device | str) -> "RowSampling":
        """From each row's options."""
        top_k = [min(row.top_k or vocab_size, vocab_size) for row in rows]
        top_p, min_p = [row.top_p or 1.0 for row in rows], [row.min_p or 0.0 for row in rows]

        def on_device(values: Sequence[float] | Sequence[bool], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            temperature=on_device([1.0 if row.greedy else row.temperature for row in rows], torch.float32),
            top_k=on_device(top_k, torch.int64),
            top_p=on_device(top_p, torch.float32),
            min_p=on_device(min_p, torch.float32),
            greedy=on_device([row.greedy for row in rows], torch.bool),
            all_greedy=all(row.greedy for row in rows),
            filters=(min(top_k) < vocab_size, min(top_p) < 1, max(min_p) > 0),
        )


def choose_rows(logits: Tensor, rows: RowSampling, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, ids [n] int64, and the row's largest logit [n].

    The same tokens as `generation.sampling.choose` gives each row alone. A token means nothing where the largest logit
    is not finite. Nothing here waits for a GPU.

    Args:
        logits: [n v] float32, after biases, masks and the repetition penalty.
        rows: how each row samples.
        numbers: [n] float64 in [0, 1), random; not read where a row is greedy.
    """
    best, ids = logits.max(dim=-1)
    if rows.all_greedy:
        return ids, best
    drawn = pick(row_weights(logits, rows), numbers)
    return torch.where(rows.greedy, ids, drawn), best


def row_weights(logits: Tensor, rows: RowSampling) -> Tensor:
    """Probabilities of the next token [n v] after each row's filters, relative to the best token's (not normalised)."""
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / rows.temperature.unsqueeze(1)).exp()
    uses_top_k, uses_top_p, uses_min_p = rows.filters
    if uses_top_k or uses_top_p:
        best = _sorted(weights, rows)
        if uses_top_k:
            edge = best.gather(-1, (rows.top_k - 1).clamp(max=best.shape[-1] - 1).unsqueeze(1))
            edge = edge.where((rows.top_k < weights.shape[-1]).unsqueeze(1), edge.new_zeros(()))
            weights = weights * (weights >= edge)
        if uses_top_p:
            weights = weights * (weights >= _nucleus_edge(weights, best, rows.top_p))
    if uses_min_p:
        weights = weights * (weights >= rows.min_p.unsqueeze(1))
    return weights


def _sorted(weights: Tensor, rows: RowSampling) -> Tensor:
    """The largest weights of each row in order, as many as the filters may look at."""
    if weights.is_cuda:  # no waiting for a count
        return weights.sort(dim=-1, descending=True).values
    size = weights.shape[-1]
    limited = rows.top_k < size
    count = int(rows.top_k.where(limited, 0).max())
    # Of the others the nucleus: tokens below this hold less than 1 - top_p together.
    mass = weights.sum(dim=-1, keepdim=True)
    nucleus = (weights >= mass * (1 - rows.top_p.unsqueeze(1)) / size).sum(dim=-1)
    filtered = (rows.top_p < 1) & ~limited
    count = max(count, int(nucleus.where(filtered, 0).max()), 1)
    return weights.topk(count, dim=-1).values


def _nucleus_edge(weights: Tensor, best: Tensor, top_p: Tensor) -> Tensor:
    """Least weight [n 1] of the nucleus, the fewest tokens that hold top_p of the probability (arXiv 1904.09751)."""
    target = top_p.unsqueeze(1) * weights.sum(dim=-1, keepdim=True)
    missing = (best.cumsum(dim=-1) < target).sum(dim=-1, keepdim=True)  # tokens that do not reach top_p yet
    edge = best.gather(-1, missing.clamp(max=best.shape[-1] - 1))
    return edge.where(top_p.unsqueeze(1) < 1, edge.new_zeros(()))
