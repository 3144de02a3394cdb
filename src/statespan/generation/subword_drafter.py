"""SubwordDrafter: a subword model drafts for a byte model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.generation.drafters import Draft
from statespan.generation.sampling import Sampling
from statespan.generation.steps import Steps, feed, reclaim
from statespan.generation.subwords import SubwordVocabulary, last_word
from statespan.models.language_model import LanguageModel, Tokenizer


@dataclass(frozen=True)
class SubwordDrafter:
    """MambaByte's form (arXiv 2401.13660, section 4): a subword model writes on, the byte model verifies the bytes.

    The subword model keeps what it read of whole words. The last word of the text, which may be cut inside a token, it
    writes again, with the likeliest tokens that fit the text.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None = None  # None: the model's own

    def begin(self, target: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> "SubwordDrafting":
        vocabulary = SubwordVocabulary(self.model, target, self.tokenizer)
        return SubwordDrafting([_Words(self.model, vocabulary) for _ in seeds])


class SubwordDrafting:
    """Drafting by SubwordDrafter, row by row."""

    def __init__(self, rows: "list[_Words]") -> None:
        self._rows = rows

    def propose(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        return [
            Draft(row.write(bytes(text), count)) for row, text, count in zip(self._rows, texts, counts, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]


class _Words:
    """A subword model that has absorbed the whole words of one text."""

    def __init__(self, model: LanguageModel, vocabulary: SubwordVocabulary) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._state, self._step = model.new_state(1), Steps(model, 1)
        self._logits: Tensor | None = None  # [1 v], after the words
        self._absorbed = 0  # bytes
        if vocabulary.bos_ids:
            self._absorb(vocabulary.bos_ids)

    @torch.inference_mode()
    def _absorb(self, ids: Sequence[int]) -> None:
        reclaim(self._state)
        logits, self._state = feed(self._model, [ids], self._state)
        self._logits = logits[:, -1]

    @torch.inference_mode()
    def write(self, text: bytes, count: int) -> tuple[int, ...]:
        """At most `count` bytes that may follow."""
        end = last_word(text)
        if end > self._absorbed:
            ids = self._vocabulary.encode(text[self._absorbed : end])
            self._absorbed = end
            if ids:
                self._absorb(ids)
        if self._logits is None:
            return ()
        reclaim(self._state)
        self._step.start(self._state, count + len(text) - self._absorbed)
        logits, begun, written = self._logits, text[self._absorbed :], b""
        while len(written) < count:
            token = self._vocabulary.likeliest(logits, {0: begun})[0]
            piece = b"" if token is None else self._vocabulary.text_of(token)
            if token is None or not piece:  # cut inside a character, an end token, or a part of a character
                break
            written += piece[len(begun) :]
            begun = begun[len(piece) :]
            logits = self._step([token])
        return tuple(written[:count])
