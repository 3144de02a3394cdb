"""Drafters: cheap guesses at what a model will say next, for it to verify (docs/speculation.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.sampling import Sampling, choose, random_numbers, weights
from statespan.generation.subwords import SubwordVocabulary, last_word
from statespan.layers.state import KVCache, ModelState
from statespan.models.language_model import LanguageModel, Tokenizer

FEW = 4  # tokens that are fed one by one in less time than at once
DRAFT_SEED = 0x5EED  # keeps what a drafter draws apart from the numbers that judge it


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


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary (arXiv 2211.17192). It chooses its tokens as the large one does."""

    model: LanguageModel

    def begin(self, target: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> "ModelDrafting":
        theirs, ours = self.model.config.vocab_size, target.config.vocab_size
        if theirs != ours:
            raise UserError(f"the draft model has {theirs} tokens and the model {ours}; they must share a vocabulary")
        return ModelDrafting(self.model, sampling, seeds)


class ModelDrafting:
    """Drafting by a model. Its state has absorbed the beginnings of the texts; what it only drafted it forgets."""

    def __init__(self, model: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> None:
        # The penalty depends on the drafts themselves; the verifier counts it in.
        self._model, self._sampling = model, sampling
        self._generators = [torch.Generator().manual_seed((seed ^ DRAFT_SEED) % 2**63) for seed in seeds]
        self._state = model.new_state(len(seeds))
        self._absorbed = [0] * len(seeds)
        self._step = Steps(model, len(seeds))

    def keep(self, rows: Sequence[int]) -> None:
        self._generators = [self._generators[row] for row in rows]
        self._absorbed = [self._absorbed[row] for row in rows]
        self._state = self._state.select(torch.tensor(rows))
        self._step = Steps(self._model, len(rows))

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        logits = self._catch_up(texts)
        self._step.start(self._state, max(counts))
        ids: list[list[int]] = []
        probabilities: list[Tensor] = []
        for step in range(max(counts)):
            if step:
                logits = self._step(ids[-1])
            ids.append(self._choose(logits.float(), probabilities))
        drafts: list[Draft] = []
        for row, count in enumerate(counts):
            drawn = (
                None if self._sampling.greedy else torch.stack([q[row] for q in probabilities[:count]] or [logits[0]])
            )
            drafts.append(Draft(tuple(step[row] for step in ids[:count]), drawn))
        return drafts

    def _choose(self, logits: Tensor, probabilities: list[Tensor]) -> list[int]:
        if self._sampling.greedy:
            return logits.argmax(-1).tolist()
        likely = weights(logits, self._sampling)
        probabilities.append(likely / likely.sum(-1, keepdim=True))
        numbers = random_numbers(self._generators, 1)[0].to(logits.device)
        return choose(logits, self._sampling, numbers)[0].tolist()

    def _catch_up(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Absorb what is new in the texts, one token at least: the logits after them [b v]."""
        new = [text[done:] for text, done in zip(texts, self._absorbed, strict=True)]
        self._absorbed = [len(text) for text in texts]
        reclaim(self._state)
        length = len(new[0])
        if length > FEW or any(len(tokens) != length for tokens in new):
            logits, self._state = feed(self._model, new, self._state)
            return logits[:, -1]
        self._step.start(self._state, length)
        for column in range(length - 1):
            self._step([tokens[column] for tokens in new])
        logits = self._step([tokens[-1] for tokens in new])
        self._state = self._step.state()
        return logits


class Steps:
    """Single steps of a batch: a decoder fed from the host; on a GPU a CUDA graph."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        decoder, ids = model.decoder(batch_size), torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._decoder, self._ids, self.captures = decoder, ids, decoder.captures
        self._run = decoder.captured(lambda: decoder(ids))

    def start(self, state: ModelState, room: int) -> None:
        """Go on from `state`, which is not changed, with room for so many tokens."""
        self._decoder.start(state, room)

    def state(self) -> ModelState:
        """The state as a value."""
        return self._decoder.state()

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Feed each row its token: logits [b v], overwritten by the next step."""
        self._ids.copy_(torch.tensor(token_ids))
        return self._run()


def reclaim(state: ModelState) -> None:
    """Let caches grow in place again: what was appended behind `state` is given up, and nobody holds it."""
    for layer in state.layers:
        if isinstance(layer, KVCache):
            layer.fill.count = layer.length


def feed(
    model: LanguageModel, rows: Sequence[Sequence[int]], state: ModelState, length: int = 0
) -> tuple[Tensor, ModelState]:
    """Feed rows of unequal length, padded on the left, to `length` at least: logits [b t v] and the next state."""
    length = max(length, *map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=model.device)
    mask: Tensor | None = None
    if any(len(row) < length for row in rows):
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model(ids, attention_mask=mask, state=state)
    assert output.logits is not None and output.state is not None  # a state went in, and logits were asked for
    return output.logits, output.state


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
