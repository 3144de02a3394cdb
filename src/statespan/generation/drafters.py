"""Drafters: cheap guesses at what a model will say next, for it to verify (docs/speculation.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from statespan.generation.sampling import Sampling
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next in one row."""

    ids: tuple[int, ...] = ()
    probabilities: Tensor | None = None  # [len(ids) v] float32 that each was drawn from; None: no chance was involved


class Drafting(Protocol):
    """A drafter at work on the rows of one batch."""

    def propose(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        """For each row, whose tokens so far are its text, at most so many tokens."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        ...


class Drafter(Protocol):
    """Where drafts come from. It holds no state of a generation and can be used for many."""

    def begin(self, target: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> Drafting:
        """Start with rows whose tokens are chosen so, one seed a row."""
        ...
