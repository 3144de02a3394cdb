"""A decode step: each row's newest token goes in, its next one, or several, come out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from statespan.generation.batch import TokenLogprob, token_logprobs
from statespan.models.transfer import to_device
from statespan.serving.adjustments import Drafts, adjusted
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
        """The next tokens of each sample; sample i is in row i. None come where a step from before is still to be read.

        Before and after, row i has absorbed the first `pool.num_tokens[i]` of the sample's tokens: all but the newest,
        fewer where a step leaves some to the next one, or all where the next one runs already. The engine appends
        those that are returned to `token_ids`.
        """
        ...


@dataclass(frozen=True)
class _Choice:
    """Tokens that the device has chosen, or will have."""

    samples: tuple[Sample, ...]
    ids: Tensor  # [n] int64, where the model is
    told: Tensor  # [2 n] float32 on the host: the ids and the largest logits, when `ready`
    ready: torch.cuda.Event | None

    def read(self) -> list[tuple[int, float]]:
        """Each sample's token and largest logit; waits for the device."""
        if self.ready is not None:
            self.ready.synchronize()
        ids, largest = self.told.tolist()
        return [(int(token_id), logit) for token_id, logit in zip(ids, largest, strict=True)]


class PlainDecode:
    """One token a row and step.

    Args:
        runner: feeds the rows.
        vocab_size: of the model.
        device: where it is.
        ahead: start the next step before this one's tokens are read, where no sample's next token depends on what the
            host makes of this one: a GPU works on while replies are sent. When rows change, the step that runs is
            awaited first.
    """

    extra_tokens = 0

    def __init__(self, runner: Runner, vocab_size: int, device: torch.device, *, ahead: bool = False) -> None:
        self._runner, self._vocab_size, self._device, self._ahead = runner, vocab_size, device, ahead
        self._rows: tuple[Sample, ...] = ()
        self._sampling: RowSampling | None = None
        self._running: _Choice | None = None  # of a step whose tokens nobody has read

    @property
    def unread(self) -> bool:
        """Whether a step runs whose tokens nobody has read."""
        return self._running is not None

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample], *, go_on: bool = True) -> list[list[Chosen] | Failed]:
        """As Decode's; without `go_on` no step is started ahead."""
        running, self._running = self._running, None
        ahead = self._ahead and go_on
        if running is None or not any(sample in running.samples for sample in samples):
            logits = self._runner.decode([sample.pending for sample in samples])
            if not ahead or any(_waits(sample) for sample in samples):
                return self.choose(logits, samples)
            running = self._ahead_choice(logits, samples)
        last = any(sample.num_new + 1 >= sample.options.max_new_tokens for sample in running.samples)
        if ahead and running.samples == tuple(samples) and not last:
            self._running = self._ahead_choice(self._runner.decode(running.ids), samples)
        found = dict(zip(running.samples, running.read(), strict=True))
        outcomes: list[list[Chosen] | Failed] = []
        for sample in samples:
            one = _outcome(sample, *found[sample]) if sample in found else None
            outcomes.append(one if isinstance(one, Failed) else [] if one is None else [one])
        return outcomes

    @torch.inference_mode()
    def choose(
        self, logits: Tensor, samples: Sequence[Sample], drafts: Drafts | None = None
    ) -> list[list[Chosen] | Failed]:
        """The next tokens of each sample: one, and one more behind each draft that it chose itself.

        Args:
            logits: [n v], one row a sample. With drafts a sample has a place before its first draft and one after each
                of its drafts, behind each other.
            samples: whose they are.
            drafts: tokens that may come next; none for samples with a constraint.
        """
        drafts = [()] * len(samples) if drafts is None else drafts
        choice = self._choice(logits, samples, drafts)
        found = choice.read()
        places = [sample for sample, draft in zip(samples, drafts, strict=True) for _ in range(len(draft) + 1)]
        logprobs = self._logprobs(logits.float(), choice.ids, places)
        outcomes: list[list[Chosen] | Failed] = []
        start = 0
        for sample, draft in zip(samples, drafts, strict=True):
            chosen, failed = list[Chosen](), None
            for place, expected in enumerate((*draft, None), start):
                one = _outcome(sample, *found[place], logprobs.get(place))
                if isinstance(one, Failed):
                    failed = one
                    break
                chosen.append(one)
                if one.token_id != expected:
                    break
            outcomes.append(chosen if failed is None else failed)
            sample.numbers.use(0 if sample.options.greedy else len(chosen))
            start += len(draft) + 1
        return outcomes

    def _ahead_choice(self, logits: Tensor, samples: Sequence[Sample]) -> _Choice:
        """One token a sample, which is sure to be taken: its random number is used up."""
        choice = self._choice(logits, samples, [()] * len(samples))
        for sample in samples:
            if not sample.options.greedy:
                sample.numbers.use()
        return choice

    def _choice(self, logits: Tensor, samples: Sequence[Sample], drafts: Drafts) -> _Choice:
        """Choose on the device, at all places; nothing waits for it, and no random number is used up."""
        if self._sampling is None or self._rows != tuple(samples):
            self._rows = tuple(samples)
            self._sampling = RowSampling.of([sample.options for sample in samples], self._vocab_size, self._device)
        sampling, sizes = self._sampling, [len(draft) + 1 for draft in drafts]
        if max(sizes) > 1:
            sampling = sampling.repeated(sizes)
        numbers = torch.zeros(sum(sizes), dtype=torch.float64)
        if not sampling.all_greedy:
            each = zip(samples, sizes, strict=True)
            drawn = [[0.0] * size if sample.options.greedy else sample.numbers.peek(size) for sample, size in each]
            numbers = torch.tensor([number for some in drawn for number in some], dtype=torch.float64)
        if not sampling.all_greedy and self._device.type != "mps":
            numbers = to_device(numbers, torch.float64, self._device)
        ids, best = choose_rows(adjusted(logits.float(), samples, drafts), sampling, numbers)
        told, ready = torch.stack([ids.float(), best]), None  # float32 holds the ids of any vocabulary
        if self._device.type == "cuda":
            told, ready = told.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        return _Choice(self._rows, ids, told, ready)

    def _logprobs(self, logits: Tensor, ids: Tensor, samples: Sequence[Sample]) -> dict[int, TokenLogprob]:
        """By row, where they are asked for: of the token just chosen, and of the most likely ones."""
        rows = [row for row, sample in enumerate(samples) if sample.options.logprobs is not False]
        if not rows:
            return {}
        index = torch.tensor(rows, device=logits.device)
        num_top = [samples[row].options.num_top for row in rows]
        found = token_logprobs(logits[index], ids[index].tolist(), max(num_top))
        return {row: replace(one, top=one.top[:count]) for row, one, count in zip(rows, found, num_top, strict=True)}


def _waits(sample: Sample) -> bool:
    """Whether the host must see a token before the next one can be chosen."""
    return sample.constraint is not None or sample.history is not None or sample.options.logprobs is not False


def _outcome(sample: Sample, token_id: int, largest: float, logprob: TokenLogprob | None = None) -> Chosen | Failed:
    if math.isfinite(largest):
        return Chosen(token_id, logprob)
    if sample.constraint is not None and largest == -torch.inf:
        return Failed("the constraint allows no token here; check that the grammar and the tokenizer fit")
    return Failed(
        f"new token {sample.num_new}: the largest logit is {largest}; the weights or the state hold NaN or overflowed: "
        "check the checkpoint, or try dtype float32"
    )
