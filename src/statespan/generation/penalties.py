"""Penalties: logits of tokens that came before are moved away from being chosen again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """The tokens of b rows that penalties look at. They are written in place, so that a CUDA graph can hold them."""

    seen: Tensor  # [b v] bool: whether a token is in prompt or reply
    counts: Tensor  # [b v] float32: how often it was generated

    @classmethod
    def empty(cls, shape: tuple[int, int], device: torch.device | str) -> "History":
        """Of rows without tokens [b v]."""
        return cls(
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Each row has its prompt and nothing else."""
        self.seen.zero_()
        self.counts.zero_()
        for seen, prompt in zip(self.seen, prompts, strict=True):
            seen[torch.tensor(prompt, dtype=torch.int64, device=seen.device)] = True

    def add(self, ids: Tensor) -> None:
        """A generated token [b] int64 of each row; nothing here waits for a GPU."""
        index = ids.unsqueeze(1)
        self.seen.scatter_(1, index, True)
        self.counts.scatter_add_(1, index, self.counts.new_ones(index.shape))

    def add_token(self, row: int, token_id: int) -> None:
        """A generated token of one row."""
        self.seen[row, token_id] = True
        self.counts[row, token_id] += 1

    def rows(self, index: Tensor) -> "History":
        """Copies of these rows."""
        return History(self.seen[index], self.counts[index])

    def copy_(self, other: "History") -> None:
        """Become what another one is."""
        self.seen.copy_(other.seen)
        self.counts.copy_(other.counts)

    def at_places(self, drafts: Sequence[Sequence[int]]) -> "History":
        """Each row before its first draft and after each of its drafts, the rows behind each other."""
        device, sizes = self.seen.device, torch.tensor([len(ids) + 1 for ids in drafts])
        places = self.rows(torch.arange(len(drafts)).repeat_interleave(sizes).to(device))
        place = 0
        for ids in drafts:
            for count, token in enumerate(ids, 1):
                places.seen[place + count : place + len(ids) + 1, token] = True
                places.counts[place + count : place + len(ids) + 1, token] += 1
            place += len(ids) + 1
        return places


def penalize(
    logits: Tensor,
    history: History,
    *,
    repetition: float | Tensor = 1.0,
    frequency: float | Tensor = 0.0,
    presence: float | Tensor = 0.0,
) -> Tensor:
    """Logits [b v] after the penalties; each may be a tensor [b 1], one a row.

    Logits of tokens seen are divided by `repetition` if positive, else multiplied (CTRL, arXiv 1909.05858, section
    4.1). Then `frequency` is taken off for each time that a token was generated, and `presence` once (OpenAI's API).
    """
    moved = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(history.seen, moved, logits) - frequency * history.counts - presence * (history.counts > 0)
