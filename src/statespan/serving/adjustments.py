"""What is done to rows' logits before tokens are chosen: biases, constraints and penalties, each row its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from statespan.generation.options import GenerationOptions
from statespan.generation.penalties import History, penalize
from statespan.models.transfer import to_device
from statespan.serving.job import Sample

Drafts = Sequence[Sequence[int]]  # of each row: tokens that may come next


def adjusted(logits: Tensor, samples: Sequence[Sample], drafts: Drafts | None = None) -> Tensor:
    """Logits after biases, constraints and penalties, in this order; those given stay as they are.

    Args:
        logits: [n v] float32: one row a sample. With drafts a sample has a place before its first draft and one after
            each of its drafts, behind each other.
        samples: whose they are.
        drafts: none for samples with a constraint.
    """
    if not any(sample.adjusts for sample in samples):
        return logits
    logits = logits.clone()
    drafts = [()] * len(samples) if drafts is None else drafts
    places = logits.split([len(ids) + 1 for ids in drafts])
    for sample, rows in zip(samples, places, strict=True):
        if sample.bias is not None:
            ids, values = sample.bias
            rows.index_add_(1, ids, values.expand(len(rows), -1))
        if sample.constraint is not None:
            rows.masked_fill_(~sample.constraint.mask().to(logits.device, non_blocking=True), -torch.inf)
    _penalize(logits, samples, drafts)
    return logits


def _penalize(logits: Tensor, samples: Sequence[Sample], drafts: Drafts) -> None:
    """In place, all rows with penalties at once."""
    options, histories, index = list[GenerationOptions](), list[History](), list[int]()
    start = 0
    for sample, ids in zip(samples, drafts, strict=True):
        end = start + len(ids) + 1
        if sample.history is not None:
            options += [sample.options] * (end - start)
            histories.append(sample.history.at_places([ids]) if ids else sample.history)
            index += range(start, end)
        start = end
    if not index:
        return

    def column(name: str) -> Tensor:
        """An option at each place [m 1]."""
        return to_device([getattr(one, name) for one in options], torch.float32, logits.device).unsqueeze(1)

    at = to_device(index, torch.int64, logits.device)
    logits[at] = penalize(
        logits[at],
        History(torch.cat([history.seen for history in histories]), torch.cat([h.counts for h in histories])),
        repetition=column("repetition_penalty"),
        frequency=column("frequency_penalty"),
        presence=column("presence_penalty"),
    )
