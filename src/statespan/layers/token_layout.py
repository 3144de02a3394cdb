"""Where each token stands in its segment: what attention and recurrent baselines need from segment numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Places of the tokens of a batch with segments (docs/architecture.md)."""

    real: Tensor  # [b t] bool, False for padding
    run: Tensor  # [b t] int64, 0 for the row's first segment, which continues a state, then 1, 2, ...; -1 for padding
    index: Tensor  # [b t] int64, place among the real tokens of its run
    last_run: Tensor  # [b] int64, the run of the row's last real token; 0 for a row of padding


def token_layout(segments: Tensor) -> TokenLayout:
    """Read `segments` [b t], in which a negative number is padding and a change starts a new run."""
    real = segments >= 0
    place = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    newest = torch.where(real, place, -1).cummax(dim=1).values  # newest real token at or before each place
    before = torch.cat([newest.new_full((newest.shape[0], 1), -1), newest[:, :-1]], dim=1)
    previous = segments.gather(1, before.clamp(min=0))
    starts = real & (before >= 0) & (previous != segments)
    run = starts.cumsum(dim=1)
    count = real.cumsum(dim=1) - 1
    first = torch.where(starts, count, 0).cummax(dim=1).values
    return TokenLayout(
        real,
        torch.where(real, run, -1),
        torch.where(real, count - first, 0),
        run[:, -1],
    )
