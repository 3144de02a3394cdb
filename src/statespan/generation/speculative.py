"""Speculative decoding with exact rollback: drafts are verified in one forward, and nothing unverified is kept.

A verify forward starts from the committed state and feeds each row's `pending` tokens, which are chosen and not yet
absorbed (the newest at least), and its drafts. On a GPU the state after each token is kept, and a row goes on from the
one after its last true token. Elsewhere the row's new state is committed where all its drafts are accepted. Otherwise
its old state stays, which is the rollback of SSM, conv and cached keys at once, and the accepted tokens join `pending`:
the next forward feeds them again, at the cost of a longer row and not of another forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.acceptance import Verdict, judge
from statespan.generation.batch import TokenLogprob, token_logprobs
from statespan.generation.drafters import Draft, Drafter
from statespan.generation.idle import give_back_at_end
from statespan.generation.options import GenerationOptions
from statespan.generation.pace import Kind, Pace
from statespan.generation.penalties import History
from statespan.generation.sampling import RandomNumbers
from statespan.generation.steps import reclaim
from statespan.generation.verifier import Forwards, Verification, give_back, take
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel

MOST_PENDING = 16  # tokens; a row with more of them is fed without drafts, which commits it


@dataclass(frozen=True)
class Speculation:
    """How to speculate. Greedy tokens are those of plain decoding, sampled ones have exactly the model's distribution.

    With a drafter that leaves nothing to chance (PromptLookup, SubwordDrafter, and any with greedy options) a seed
    gives the tokens that it gives without speculation, too.
    """

    drafter: Drafter
    num_drafts: int = 6  # tokens proposed a row and step, at most
    adaptive: bool = True  # measure both ways, and speculate only while that is faster

    def __post_init__(self) -> None:
        if self.num_drafts < 1:
            raise UserError(f"num_drafts must be at least 1, got {self.num_drafts}")


@dataclass
class SpeculationReport:
    """What speculation did in one call of generate, all rows together. It counts until the call ends."""

    verify_steps: int = 0
    plain_steps: int = 0
    tokens: int = 0  # all new ones but each row's first
    drafted: int = 0
    accepted: int = 0  # of those drafted

    @property
    def acceptance(self) -> float:
        """Fraction of the drafted tokens that were accepted; 0 without any."""
        return self.accepted / self.drafted if self.drafted else 0.0


class SpeculativeBatch:
    """The rows that are still being generated, as DecodeBatch, but a step gives each row one token or several."""

    def __init__(
        self,
        model: LanguageModel,
        logits: Tensor,
        state: ModelState,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: GenerationOptions,
        speculation: Speculation,
    ) -> None:
        """`logits` [b v] and `state` come from `absorb`; `prompts` are the tokens that it was fed."""
        self.report = SpeculationReport()
        self._model, self._options, self._speculation = model, options, speculation
        self._texts = [list(prompt) for prompt in prompts]
        self._numbers = [RandomNumbers(torch.Generator().manual_seed(seed)) for seed in seeds]
        self._said = options.history((len(seeds), logits.shape[1]), logits.device)
        if self._said is not None:
            self._said.begin(prompts)
        self._left = [options.max_new_tokens] * len(seeds)
        self._drafting = speculation.drafter.begin(model, options, seeds)
        self._pace = Pace() if speculation.adaptive else None
        self._speculated = False  # in the last step
        self._holds = [take(model, len(seeds), 1 + speculation.num_drafts)]
        give_back_at_end(self, model, self._holds, give_back)
        self._in_steps = False  # the committed state is that of the steps, and `_state` an old one
        self._state = state  # committed
        self._pending: list[list[int]] = []  # what it has not absorbed
        self._found: Verification | None = None  # of the last verify forward
        self._waiting: list[list[int]] = []  # what was pending before it
        self._verdicts: list[Verdict] = []
        self._logits = logits  # [n v] float32, at all places of the last step
        self._due = True  # a step: the first one has its logits

    @property
    def _forwards(self) -> Forwards:
        return self._holds[0]

    @torch.inference_mode()
    def choose(self) -> list[tuple[int, ...]]:
        """The new tokens of each row, in order."""
        if self._due and self._verdicts:
            self._advance()
        elif self._due:
            self._settle(self._logits.float(), [Draft()] * len(self._texts))
            self._pending = [list(verdict.ids) for verdict in self._verdicts]
        self._due = False
        return [verdict.ids for verdict in self._verdicts]

    def advance(self) -> None:
        """Go on, when the next tokens are asked for."""
        self._due = True

    def logprobs(self) -> list[tuple[TokenLogprob, ...]]:
        """Log-probabilities of the tokens just chosen, and of the most likely ones."""
        sizes = [verdict.num_drafted + 1 for verdict in self._verdicts]
        rows = zip(self._logits.split(sizes), self._verdicts, strict=True)
        return [
            tuple(token_logprobs(logits[: len(verdict.ids)], verdict.ids, self._options.num_top))
            for logits, verdict in rows
        ]

    def _advance(self) -> None:
        """Go on by a verify forward, or by a plain step where speculation does not pay or nothing was drafted."""
        started, settled = perf_counter(), self._forwards.verify.settled
        speculating = self._pace is None or self._pace.speculates(len(self._texts))
        drafts = self._propose() if speculating else [Draft()] * len(self._texts)
        drafted = sum(len(draft.ids) for draft in drafts)
        if plain := not drafted and all(len(tokens) == 1 for tokens in self._pending):
            self._step_plainly(drafts)
        else:
            self._verify_drafts(drafts)
        tokens = sum(len(verdict.ids) for verdict in self._verdicts)
        report = self.report
        report.plain_steps, report.verify_steps = report.plain_steps + plain, report.verify_steps + (not plain)
        report.tokens, report.drafted = report.tokens + tokens, report.drafted + drafted
        report.accepted += sum(verdict.num_accepted for verdict in self._verdicts)
        if self._pace is not None and (settled or not speculating):
            kind = Kind.PLAIN if not speculating else Kind.VAIN if plain else Kind.VERIFIED
            # The first step that speculates reads what plain ones said.
            steady = self._speculated if speculating else plain
            self._pace.note(len(self._texts), kind, perf_counter() - started, tokens, steady=steady)
        self._speculated = speculating

    def _propose(self) -> list[Draft]:
        most = self._speculation.num_drafts
        counts = [
            0 if len(pending) > MOST_PENDING else min(most, left - 1)
            for pending, left in zip(self._pending, self._left, strict=True)
        ]
        return self._drafting.propose(self._texts, counts) if any(counts) else [Draft()] * len(self._texts)

    def _step_plainly(self, drafts: Sequence[Draft]) -> None:
        """One token a row through the decoder."""
        if not self._in_steps:
            self._forwards.step.start(self._state, max(self._left))
            self._in_steps = True
        logits = self._forwards.step([tokens[0] for tokens in self._pending])
        self._settle(logits.float(), drafts)
        self._pending = [list(verdict.ids) for verdict in self._verdicts]

    def _verify_drafts(self, drafts: Sequence[Draft]) -> None:
        """Pending and drafted tokens of all rows in one forward."""
        state = self._committed()
        reclaim(state)
        rows = [[*pending, *draft.ids] for pending, draft in zip(self._pending, drafts, strict=True)]
        wanted = [len(draft.ids) + 1 for draft in drafts]
        found = self._forwards.verify(self._model, rows, wanted, state)
        self._settle(found.logits.float(), drafts)
        self._found, self._waiting = found, self._pending
        chosen = [[*pending, *verdict.ids] for pending, verdict in zip(self._pending, self._verdicts, strict=True)]
        self._state, absorbed = found.commit([len(tokens) - 1 for tokens in chosen])
        self._pending = [tokens[count:] for tokens, count in zip(chosen, absorbed, strict=True)]

    def _settle(self, logits: Tensor, drafts: Sequence[Draft]) -> None:
        """Accept, reject and choose, from the logits [n v] at all places that count."""
        self._logits = logits
        self._verdicts = judge(logits, drafts, self._options, self._numbers, self._history(drafts))
        for row, verdict in enumerate(self._verdicts):
            self._texts[row] += verdict.ids
            if self._said is not None:
                for token in verdict.ids:
                    self._said.add_token(row, token)
            self._left[row] -= len(verdict.ids)

    def _history(self, drafts: Sequence[Draft]) -> History | None:
        """What the penalties look at before each place, drafts included."""
        if self._said is None:
            return None
        return self._said.at_places([draft.ids for draft in drafts])

    def _committed(self) -> ModelState:
        if self._in_steps:
            self._state, self._in_steps = self._forwards.step.state(), False
        return self._state

    @torch.inference_mode()
    def state_of(self, place: int, count: int) -> tuple[ModelState, int]:
        """A state and its row that has absorbed this row's text up to the first `count` tokens of this step, but for
        the newest of them."""
        verdict = self._verdicts[place]
        if count == len(verdict.ids) and len(self._pending[place]) == 1:
            return self._committed(), place
        assert self._found is not None  # a plain step gives one token, and leaves one
        return self._found.state_after(place, [*self._waiting[place], *verdict.ids[: count - 1]]), 0

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        with torch.inference_mode():
            self._state = self._committed().select(torch.tensor(rows))
        self._drafting.keep(rows)
        give_back(self._model, self._holds[0])
        self._holds[0] = take(self._model, len(rows), 1 + self._speculation.num_drafts)
        self._texts = [self._texts[row] for row in rows]
        self._said = None if self._said is None else self._said.rows(torch.tensor(rows, device=self._logits.device))
        self._numbers = [self._numbers[row] for row in rows]
        self._left = [self._left[row] for row in rows]
        self._pending = [self._pending[row] for row in rows]
