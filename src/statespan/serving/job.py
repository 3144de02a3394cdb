"""Job and Sample: a request on its way through the engine, and each reply that grows from it."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statespan.generation.batch import TokenLogprob
from statespan.generation.sampling import RandomNumbers
from statespan.generation.stopping import StopStrings
from statespan.generation.streaming import TextDecoder
from statespan.models.language_model import LanguageModel, Tokenizer
from statespan.serving.request import Event, FinishReason, Request, Usage

if TYPE_CHECKING:
    from statespan.serving.constraint import Constraint


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token of a row."""

    token_id: int
    logprob: TokenLogprob | None = None  # where the request asks for it


@dataclass(eq=False)
class Job:
    """A request in the engine, until all its samples have ended."""

    request: Request
    arrival: int  # counts up
    seed: int  # of the first sample
    submitted_s: float = 0.0  # of time.monotonic, as the others
    admitted_s: float = 0.0
    row: int = -1  # of the state pool while the prompt is prefilled
    num_absorbed: int = 0  # tokens of the prompt that the row holds
    cached_tokens: int = 0  # of these, from the prefix cache
    snapshots_at: list[int] = field(default_factory=list[int])  # where the prefill stops for a snapshot, ascending
    pages_promised: int = 0  # for the other samples' rows, until these are forked
    times_passed: int = 0  # later jobs that started while this one's memory was not free
    leader: "Job | None" = None  # while this one waits in the queue for a snapshot of that one's prompt
    leader_at: int = 0  # after so many tokens
    awaited_at: int = 0  # tokens of the prompt after which others go on from a snapshot
    num_open: int = 0  # samples that have not ended

    def __post_init__(self) -> None:
        self.num_open, self.submitted_s = self.request.num_samples, time.monotonic()

    def start(self, cached_tokens: int, pages_promised: int) -> None:
        """The job has a row, which holds so many tokens of the prompt."""
        self.admitted_s = time.monotonic()
        self.cached_tokens = self.num_absorbed = cached_tokens
        self.pages_promised = pages_promised

    @property
    def num_to_prefill(self) -> int:
        """Prompt tokens still to be absorbed. The last one waits: it is fed by the first decode step."""
        return len(self.request.prompt) - 1 - self.num_absorbed

    @property
    def num_tokens(self) -> int:
        """Of prompt and reply, at most."""
        return len(self.request.prompt) + self.request.options.max_new_tokens

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """The prompt."""
        return np.asarray(self.request.prompt, np.int32)

    @property
    def order(self) -> tuple[int, int]:
        """By priority, then by arrival."""
        return -self.request.priority, self.arrival

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        deadline_s = self.request.deadline_s
        return deadline_s is not None and time.monotonic() - self.submitted_s > deadline_s

    def usage(self, num_new: int = 0, first_token_s: float = 0.0) -> Usage:
        """Of one sample that ends now."""
        now = time.monotonic()
        queue_s = (self.admitted_s or now) - self.submitted_s
        total_s = now - self.submitted_s
        return Usage(len(self.request.prompt), self.cached_tokens, num_new, queue_s, first_token_s, total_s)


class Sample:
    """One reply. Its row has absorbed all tokens but the newest, which the next step feeds."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer | None, model: LanguageModel) -> None:
        request, device = job.request, model.device
        self.job, self.index, self.options = job, index, request.options
        self.row = -1  # of the state pool
        self.token_ids = list(request.prompt)  # prompt and reply
        self.num_new = 0
        self.numbers = RandomNumbers(torch.Generator().manual_seed((job.seed + index) % 2**63))
        self.constraint: Constraint | None = None if request.constraint is None else request.constraint.fork()
        self.bias: tuple[Tensor, Tensor] | None = None  # token ids and what is added to their logits
        if request.logit_bias:
            ids, values = list(request.logit_bias), list(request.logit_bias.values())
            self.bias = torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device)
        self.history = self.options.history((1, model.config.vocab_size), device)  # for the penalties, if any
        if self.history is not None:
            self.history.begin([request.prompt])
        eos_ids = (*model.config.eos_token_ids, *(() if tokenizer is None else tokenizer.eos_ids))
        self._eos_ids = frozenset[int]() if self.options.ignore_eos else frozenset(eos_ids)
        self._decoder = None if tokenizer is None else TextDecoder(tokenizer, request.prompt)
        self._stops = StopStrings(request.options.stop_strings)
        self._first_token_s = 0.0

    @property
    def pending(self) -> int:
        """The token that the next step feeds."""
        return self.token_ids[-1]

    @property
    def adjusts(self) -> bool:
        """Whether its logits are changed before a token is chosen."""
        return not (self.bias is None and self.constraint is None and self.history is None)

    def extend(self, chosen: list[Chosen]) -> Event:
        """Take over the tokens of a step, up to the one that ends the reply."""
        text, ids, logprobs = "", list[int](), list[TokenLogprob]()
        reason: FinishReason | None = None
        for one in chosen:
            ids.append(one.token_id)
            if one.logprob is not None:
                logprobs.append(one.logprob)
            piece, reason = self._push(one.token_id)
            text += piece
            if reason is not None:
                break
        return self._event(tuple(ids), text, tuple(logprobs), reason)

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """The last event of a reply that ends without a token; it carries the text that was held back."""
        text = "" if self._decoder is None else self._stops.push(self._decoder.flush()) + self._stops.flush()
        return self._event((), text, (), reason, error)

    def _push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Count the token; the text that is certain now, and why the reply ends with it."""
        if self.num_new == 0:
            self._first_token_s = time.monotonic() - self.job.submitted_s
        self.num_new += 1
        self.token_ids.append(token_id)
        if self.history is not None:
            self.history.add_token(0, token_id)
        text, reason = "", self._stop_reason(token_id)
        if self._decoder is not None and reason is None:
            text = self._stops.push(self._decoder.push(token_id))
        if reason is None and self.constraint is not None:
            self.constraint.accept(token_id)
            reason = "stop" if self.constraint.finished else None
        if reason is None and self.num_new == self.options.max_new_tokens:
            reason = "length"
        if reason is not None and self._decoder is not None:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
        return text, "stop" if self._stops.stopped else reason

    def _stop_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self._eos_ids:
            return "eos"
        return "stop" if token_id in self.options.stop_token_ids else None

    def _event(
        self,
        token_ids: tuple[int, ...],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        reason: FinishReason | None,
        error: str | None = None,
    ) -> Event:
        usage = None if reason is None else self.job.usage(self.num_new, self._first_token_s)
        return Event(self.job.request.id, self.index, token_ids, text, logprobs, reason, usage, error)
