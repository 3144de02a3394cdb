"""DecodeBatch: sequences that advance together, one token a row and step, over one explicit model state."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.generation.idle import give_back_at_end
from statespan.generation.options import GenerationOptions
from statespan.generation.sampling import log_probabilities, require_finite
from statespan.generation.stepper import Outcome, Stepper, give_back, take
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own distribution: before penalty, temperature and filters."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability) of the most likely tokens, best first


class DecodeBatch:
    """The rows that are still being generated: their state, their next logits and their random numbers.

    On a GPU the next step is under way before the tokens of this one are read, unless the caller wants states or
    log-probabilities, which belong to the step that is read. Rows that ended stay, unread, until half of them have.
    """

    def __init__(
        self,
        model: LanguageModel,
        logits: Tensor,
        state: ModelState,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: GenerationOptions,
    ) -> None:
        """`logits` [b v] and `state` come from `absorb`; `prompts` are the tokens that it was fed."""
        self.model, self.options = model, options
        self._rows = list(range(len(seeds)))  # where the rows that go on are in the stepper
        self._launched = self._read = 0  # steps
        self._outcomes: deque[tuple[list[int], Outcome]] = deque()
        self._ids: list[int] = []
        self._holds = [take(model, len(seeds), options)]
        give_back_at_end(self, model, self._holds, give_back)
        self._on_gpu = self._stepper.decoder.captures
        self._ahead = self._on_gpu and not options.return_state and options.logprobs is False
        self._start(logits, state, prompts, [torch.Generator().manual_seed(seed) for seed in seeds])

    @property
    def _stepper(self) -> Stepper:
        return self._holds[0]

    @torch.inference_mode()
    def _start(
        self,
        logits: Tensor,
        state: ModelState,
        prompts: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator],
    ) -> None:
        self._stepper.start(logits, state, prompts, generators, self.options.max_new_tokens)
        self._note()

    def _note(self) -> None:
        """A step was launched."""
        self._outcomes.append((self._rows, self._stepper.outcome()))
        self._launched += 1

    def _launch(self) -> None:
        self._stepper.advance()
        self._note()

    @torch.inference_mode()
    def choose(self) -> list[tuple[int, ...]]:
        """The next token of each row. The state has not absorbed it yet, unless steps run ahead."""
        if self._ahead and self._read and self._launched < self.options.max_new_tokens:
            self._launch()
        rows, outcome = self._outcomes.popleft()
        ids, best = outcome()
        require_finite([best[row] for row in rows])
        self._read += 1
        self._ids = [ids[row] for row in rows]
        return [(token,) for token in self._ids]

    @torch.inference_mode()
    def state_of(self, place: int, count: int) -> tuple[ModelState, int]:
        """A state and its row that has absorbed all tokens of this row but the one just chosen; not while steps run
        ahead. `count` is 1, since there is one token a step."""
        assert not self._ahead and count == 1
        return self._stepper.decoder.state(), self._rows[place]

    @property
    def _all_there(self) -> bool:
        return len(self._rows) == self._stepper.batch_size

    @torch.inference_mode()
    def logprobs(self) -> list[tuple[TokenLogprob, ...]]:
        """Log-probabilities of the tokens just chosen, and of the most likely ones."""
        logits = self._stepper.logits
        logits = logits if self._all_there else logits[torch.tensor(self._rows, device=logits.device)]
        return [(found,) for found in token_logprobs(logits, self._ids, self.options.num_top)]

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed the chosen tokens."""
        if not self._outcomes:
            self._launch()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._rows = [self._rows[row] for row in rows]
        self._outcomes = deque(([then[row] for row in rows], outcome) for then, outcome in self._outcomes)
        if self._on_gpu and 2 * len(rows) > self._stepper.batch_size:
            return
        smaller = take(self.model, len(rows), self.options)
        smaller.take_over(self._stepper, self._rows, self.options.max_new_tokens - self._launched)
        give_back(self.model, self._stepper)
        self._holds[0] = smaller
        self._rows = list(range(len(rows)))


def token_logprobs(logits: Tensor, ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens `ids` [n] chosen from `logits` [n v], and of so many of the most likely ones."""
    logprobs, chosen_ids = log_probabilities(logits), torch.tensor(ids, device=logits.device)
    chosen: list[float] = logprobs.gather(1, chosen_ids.unsqueeze(1)).squeeze(1).tolist()
    best = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(c, tuple(zip(*top, strict=True))) for c, top in zip(chosen, tops, strict=True)]
