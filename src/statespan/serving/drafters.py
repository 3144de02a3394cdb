"""Where the engine's drafts come from: the text itself, a small model, or a subword model for a byte model.

Drafts are guesses that leave nothing to chance: a sample accepts one where it is the token that the sample chooses
itself, with its own random numbers, so that its tokens are those of plain decoding whatever is drafted.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.prompt_lookup import PromptLookup, TextIndex
from statespan.generation.subwords import SubwordVocabulary, last_word
from statespan.models.language_model import LanguageModel
from statespan.models.transfer import to_device
from statespan.serving.adjustments import adjusted
from statespan.serving.draft_rows import DraftRows
from statespan.serving.job import Sample
from statespan.serving.options import EngineOptions
from statespan.serving.sampling import RowSampling, choose_rows

LONGEST_WORD = 32  # bytes; a longer one is not gone on with


class RowDrafter(Protocol):
    """Guesses what samples will say next."""

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        """For each of the samples, which are all that run, at most so many tokens."""
        ...

    def warm_up(self) -> None:
        """Compile and capture now what is needed later; nothing runs."""
        ...


def drafter_of(draft: LanguageModel, target: LanguageModel, options: EngineOptions, num_pages: int) -> RowDrafter:
    """Drafting by a model: of the same vocabulary, or a subword model for a byte model.

    Raises:
        UserError: it is neither, or a subword model without a tokenizer.
    """
    same = draft.config.vocab_size == target.config.vocab_size
    if not same and target.config.vocab_size != 256:
        raise UserError(
            f"the draft model has {draft.config.vocab_size} tokens and the model {target.config.vocab_size}; they must "
            "share a vocabulary, unless a subword model drafts for a byte model"
        )
    vocabulary = None if same else SubwordVocabulary(draft, target)
    rows = DraftRows(
        draft,
        num_rows=options.max_rows,
        num_pages=num_pages,
        page_size=options.page_size,
        prefill_tokens=options.prefill_tokens,
    )
    if vocabulary is None:
        return ModelDrafter(rows, options.num_drafts)
    return SubwordDrafter(rows, vocabulary, options.num_drafts)


class LookupDrafter:
    """What followed when the text last ended like this (generation.prompt_lookup.PromptLookup)."""

    def __init__(self, lookup: PromptLookup | None = None) -> None:
        self._lookup = lookup or PromptLookup()
        self._indices: dict[Sample, TextIndex] = {}

    def warm_up(self) -> None:
        pass

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        self._indices = {sample: self._indices.get(sample) or TextIndex(self._lookup) for sample in samples}
        each = zip(samples, counts, strict=True)
        return [self._indices[sample].find(sample.token_ids, count) if count else () for sample, count in each]


class ModelDrafter:
    """A smaller model of the same vocabulary (arXiv 2211.17192, where drafts are drawn by numbers of their own).

    It chooses with the random number by which the sample itself will choose at that place, so that where the two
    models agree they say the same.
    """

    def __init__(self, rows: DraftRows, num_drafts: int) -> None:
        self._rows, self._num_drafts = rows, num_drafts
        self._sampling: RowSampling | None = None
        self._sampled: list[Sample] = []  # whose it is

    def warm_up(self) -> None:
        self._rows.warm_up(self._num_drafts + 1)

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        rows, wanted = self._rows, dict(zip(samples, counts, strict=True))
        texts = {sample: sample.token_ids for sample in samples}
        rows.settle(texts)
        room = {sample: sample.job.num_tokens + self._num_drafts + 1 for sample in samples}
        rows.follow([sample for sample in samples if sample.constraint is None], room)
        ready = [row for row in rows.read(texts) if wanted[rows.samples[row]]]
        if not ready:
            return [()] * len(samples)
        most = max(wanted[rows.samples[row]] for row in ready)
        drafted = self._run(most)
        rows.end({row: [rows.samples[row].pending, *drafted[row]] for row in ready})
        found = {rows.samples[row]: drafted[row] for row in ready}
        return [tuple(found.get(sample, ())[:count]) for sample, count in zip(samples, counts, strict=True)]

    def _run(self, count: int) -> list[list[int]]:
        """So many tokens of each row, or more; nothing waits for a GPU before all are there."""
        rows, samples, device = self._rows, self._rows.samples, self._rows.pool.device
        if self._sampling is None or self._sampled != samples:
            size, self._sampled = rows.model.config.vocab_size, list(samples)
            self._sampling = RowSampling.of([sample.options for sample in samples], size, device)
        sampling = self._sampling
        if sampling.all_greedy and not any(sample.adjusts for sample in samples):
            # Always as many, so that there is one graph for each number of rows.
            chosen = rows.run_greedily([sample.pending for sample in samples], self._num_drafts + 1)
            if chosen is not None:
                return chosen[: self._num_drafts].T.tolist()
        numbers = torch.zeros(count, len(samples), dtype=torch.float64)
        if not sampling.all_greedy:
            drawn = [[0.0] * count if s.options.greedy else s.numbers.peek(count) for s in samples]
            numbers = torch.tensor(drawn, dtype=torch.float64).T
            numbers = numbers if device.type == "mps" else to_device(numbers.contiguous(), torch.float64, device)
        drafted: list[Tensor] = []
        rows.begin()
        logits = rows.step([sample.pending for sample in samples])
        for place in range(count):
            drafted.append(choose_rows(adjusted(logits, samples), sampling, numbers[place])[0])
            rows.mark()
            logits = rows.step(drafted[-1])  # the last one too: it may come true
        rows.mark()
        return torch.stack(drafted, dim=1).tolist()


class SubwordDrafter:
    """MambaByte's form (arXiv 2401.13660, section 4): a subword model writes on, the byte model verifies the bytes.

    The subword model keeps what it read of whole words. The last word of the text, which may be cut inside a token, it
    writes again, with the likeliest tokens that fit the text; then it is set back to before that word.
    """

    def __init__(self, rows: DraftRows, vocabulary: SubwordVocabulary, num_drafts: int) -> None:
        self._rows, self._vocabulary, self._num_drafts = rows, vocabulary, num_drafts
        self._words: dict[Sample, tuple[int, list[int]]] = {}  # bytes that are in whole words, and these as tokens

    def warm_up(self) -> None:
        self._rows.warm_up(0)

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        rows, wanted = self._rows, dict(zip(samples, counts, strict=True))
        self._words = {sample: self._read(sample) for sample in samples if sample.constraint is None}
        # A text has no more tokens than bytes; one comes before it, and each step gives a byte.
        room = {sample: sample.job.num_tokens + 1 + LONGEST_WORD + self._num_drafts for sample in samples}
        rows.follow([sample for sample, (_, ids) in self._words.items() if ids], room)
        ready = [
            row
            for row in rows.read({sample: self._words[sample][1] for sample in rows.samples})
            if wanted[rows.samples[row]] and len(self._begun(rows.samples[row])) <= LONGEST_WORD
        ]
        written = self._write({row: wanted[rows.samples[row]] for row in ready}) if ready else {}
        found = {rows.samples[row]: text for row, text in written.items()}
        return [tuple(found.get(sample, b"")) for sample in samples]

    def _read(self, sample: Sample) -> tuple[int, list[int]]:
        """The whole words of a sample's text so far."""
        begin = self._vocabulary.bos_ids
        done, ids = self._words.get(sample, (0, begin))
        text = bytes(sample.token_ids[done:])
        end = last_word(text)
        return done + end, [*ids, *self._vocabulary.encode(text[:end])] if end else ids

    def _begun(self, sample: Sample) -> bytes:
        """The last word, which may go on."""
        return bytes(sample.token_ids[self._words[sample][0] :])

    def _write(self, counts: Mapping[int, int]) -> dict[int, bytes]:
        """At most so many bytes behind the texts of some rows."""
        rows, vocabulary = self._rows, self._vocabulary
        begun = {row: self._begun(rows.samples[row]) for row in counts}
        written = dict.fromkeys(counts, b"")
        ids = [self._words[sample][1][-1] for sample in rows.samples]
        going = set(counts)
        rows.begin()
        while going:
            chosen = vocabulary.likeliest(rows.step(ids), {row: begun[row] for row in going})
            for row in list(going):
                token = chosen[row]
                text = b"" if token is None else vocabulary.text_of(token)
                if token is None or not text:  # cut inside a character, an end token, or a part of a character
                    going.discard(row)
                    continue
                ids[row] = token
                written[row] += text[len(begun[row]) :]
                begun[row] = begun[row][len(text) :]
                if len(written[row]) >= counts[row]:
                    going.discard(row)
        rows.end({})
        return {row: written[row][: counts[row]] for row in counts}
