"""A decode step: each row's newest token goes in, its next one, or several, come out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from statespan.generation.batch import TokenLogprob, token_logprobs
from statespan.generation.sampling import penalize_repetition
from statespan.serving.job import Chosen, Sample
from statespan.serving.runner import Runner
from statespan.serving.sampling import RowSampling, choose_rows


@dataclass(frozen=True)
class Failed:
    """A row that cannot go on, and why in one line."""

    error: str


class Decode(Protocol):
    """What the engine does with the rows that are being decoded; PlainDecode, or speculation."""

    extra_tokens: int  # room that a row needs behind its last token, for tokens that are tried and dropped

    def __call__(self, samples: Sequence[Sample]) -> list[list[Chosen] | Failed]:
        """The next tokens of each sample, at least one; sample i is in row i.

        Before and after, row i has absorbed the first `pool.num_tokens[i]` of the sample's tokens: all but the newest,
        or fewer where a step leaves some to the next one. The engine appends those that are returned to `token_ids`.
        """
        ...


class PlainDecode:
    """One token a row and step."""

    extra_tokens = 0

    def __init__(self, runner: Runner, vocab_size: int, device: torch.device) -> None:
        self._runner, self._vocab_size, self._device = runner, vocab_size, device
        self._rows: tuple[Sample, ...] = ()
        self._sampling: RowSampling | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[list[Chosen] | Failed]:
        logits = self._runner.decode([sample.pending for sample in samples])
        return [one if isinstance(one, Failed) else [one] for one in self.choose(logits, samples)]

    @torch.inference_mode()
    def choose(self, logits: Tensor, samples: Sequence[Sample]) -> list[Chosen | Failed]:
        """The next token of each sample from its logits [n v]."""
        logits = logits.float()
        if self._sampling is None or self._rows != tuple(samples):
            self._rows = tuple(samples)
            self._sampling = RowSampling.of([sample.options for sample in samples], self._vocab_size, self._device)
        numbers = [0.0 if sample.options.greedy else sample.numbers.use()[0] for sample in samples]
        on_device = torch.tensor(numbers, dtype=torch.float64)
        on_device = on_device.to(self._device, non_blocking=True) if self._device.type != "mps" else on_device
        ids, best = choose_rows(self._adjusted(logits, samples), self._sampling, on_device)
        token_ids, largest, finite = torch.stack([ids.double(), best.double(), best.isfinite().double()]).tolist()
        logprobs = self._logprobs(logits, ids, samples)
        return [
            Chosen(int(token_ids[row]), logprobs.get(row)) if finite[row] else _failed(sample, largest[row])
            for row, sample in enumerate(samples)
        ]

    def _adjusted(self, logits: Tensor, samples: Sequence[Sample]) -> Tensor:
        """After logit biases, constraints and the repetition penalty, in this order; `logits` stay."""
        changed = [row for row, sample in enumerate(samples) if sample.adjusts]
        if not changed:
            return logits
        logits = logits.clone()
        for row in changed:
            sample = samples[row]
            if sample.bias is not None:
                logits[row].index_add_(0, *sample.bias)
            if sample.constraint is not None:
                allowed = sample.constraint.mask().to(self._device, non_blocking=True)
                logits[row].masked_fill_(~allowed, -torch.inf)
            if sample.seen is not None:
                logits[row] = penalize_repetition(logits[row], sample.seen, sample.options.repetition_penalty)
        return logits

    def _logprobs(self, logits: Tensor, ids: Tensor, samples: Sequence[Sample]) -> dict[int, TokenLogprob]:
        """By row, where they are asked for: of the token just chosen, and of the most likely ones."""
        rows = [row for row, sample in enumerate(samples) if sample.options.logprobs is not False]
        if not rows:
            return {}
        index = torch.tensor(rows, device=logits.device)
        num_top = [samples[row].options.num_top for row in rows]
        found = token_logprobs(logits[index], ids[index].tolist(), max(num_top))
        return {row: replace(one, top=one.top[:count]) for row, one, count in zip(rows, found, num_top, strict=True)}


def _failed(sample: Sample, largest: float) -> Failed:
    if sample.constraint is not None and largest == -torch.inf:
        return Failed("the constraint allows no token here; check that the grammar and the tokenizer fit")
    return Failed(
        f"new token {sample.num_new}: the largest logit is {largest}; the weights or the state hold NaN or overflowed: "
        "check the checkpoint, or try dtype float32"
    )
