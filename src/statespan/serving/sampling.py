"""The next token of each row, where every row has its own way of sampling. Vector form of generation/sampling.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statespan.generation.sampling import Sampling, pick
from statespan.models.transfer import to_device
from statespan.ops.decode_step.tokens import choose_best
from statespan.ops.sampling_edge import sampling_edge


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
            return to_device(values, dtype, torch.device(device))

        return cls(
            temperature=on_device([1.0 if row.greedy else row.temperature for row in rows], torch.float32),
            top_k=on_device(top_k, torch.int64),
            top_p=on_device(top_p, torch.float32),
            min_p=on_device(min_p, torch.float32),
            greedy=on_device([row.greedy for row in rows], torch.bool),
            all_greedy=all(row.greedy for row in rows),
            filters=(min(top_k) < vocab_size, min(top_p) < 1, max(min_p) > 0),
        )

    def repeated(self, counts: Sequence[int]) -> "RowSampling":
        """Each row so many times."""
        if self.all_greedy:
            return self
        index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        index = to_device(index, torch.int64, self.temperature.device)
        tensors = ("temperature", "top_k", "top_p", "min_p", "greedy")
        return replace(self, **{name: getattr(self, name)[index] for name in tensors})


def choose_rows(logits: Tensor, rows: RowSampling, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, ids [n] int64, and the row's largest logit [n].

    The same tokens as `generation.sampling.choose` gives each row alone. A token means nothing where the largest logit
    is not finite. Nothing here waits for a GPU.

    Args:
        logits: [n v] float32, after biases, masks and the repetition penalty.
        rows: how each row samples.
        numbers: [n] float64 in [0, 1), random; not read where a row is greedy.
    """
    ids, best = logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
    choose_best(logits, ids, best)
    if rows.all_greedy:
        return ids, best
    drawn = pick(row_weights(logits, rows, best), numbers)
    return torch.where(rows.greedy, ids, drawn), best


def row_weights(logits: Tensor, rows: RowSampling, best: Tensor) -> Tensor:
    """Probabilities of the next token [n v] after each row's filters, relative to the best token's (not normalised).

    Args:
        logits, rows: as for `choose_rows`.
        best: [n], each row's largest logit.
    """
    weights = (logits - best.unsqueeze(1)).div_(rows.temperature.unsqueeze(1)).exp_()
    uses_top_k, uses_top_p, uses_min_p = rows.filters
    if uses_top_k or uses_top_p:
        edge = sampling_edge(weights, rows.top_k if uses_top_k else None, rows.top_p if uses_top_p else None)
        weights.masked_fill_(weights < edge, 0)
    if uses_min_p:
        weights.masked_fill_(weights < rows.min_p.unsqueeze(1), 0)
    return weights
