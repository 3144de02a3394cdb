"""PromptLookup: drafts from the text itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from statespan.errors import UserError
from statespan.generation.drafters import Draft
from statespan.generation.sampling import Sampling
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class PromptLookup:
    """What followed when the text last ended like this: for text that quotes, edits or repeats itself."""

    shortest: int = 3  # tokens at the end of the text that must have come before
    longest: int = 32  # more than these are not compared
    candidates: int = 8  # most recent places compared

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest or self.candidates < 1:
            raise UserError(f"PromptLookup needs 1 <= shortest <= longest and a candidate, got {self}")

    def begin(self, target: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> "Lookups":
        return Lookups([TextIndex(self) for _ in seeds])


class TextIndex:
    """Where each run of `shortest` tokens of a growing text ended, newest last."""

    def __init__(self, options: PromptLookup) -> None:
        self._options = options
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._length = 0  # of the text that is indexed

    def find(self, text: Sequence[int], count: int) -> tuple[int, ...]:
        """What followed the longest earlier match of the end of `text`; of equal ones the newest."""
        size = self._options.shortest
        for end in range(max(self._length, size), len(text)):  # not the end itself, which has no continuation
            self._ends.setdefault(tuple(text[end - size : end]), []).append(end)
        self._length = max(self._length, len(text))
        if len(text) < size:
            return ()
        ends = self._ends.get(tuple(text[-size:]), [])[-self._options.candidates :]
        if not ends:
            return ()
        best = max(ends, key=lambda end: (self._matched(text, end), end))
        return tuple(text[best : best + count])

    def _matched(self, text: Sequence[int], end: int) -> int:
        """Tokens before `end` that equal those at the end of the text."""
        most = min(self._options.longest, end)
        return next((size for size in range(most) if text[end - 1 - size] != text[-1 - size]), most)


class Lookups:
    """Drafting by PromptLookup."""

    def __init__(self, indices: list[TextIndex]) -> None:
        self._indices = indices

    def propose(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        rows = zip(self._indices, texts, counts, strict=True)
        return [Draft(index.find(text, count)) for index, text, count in rows]

    def keep(self, rows: Sequence[int]) -> None:
        self._indices = [self._indices[row] for row in rows]
