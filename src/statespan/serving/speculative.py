"""Speculation in the engine: a drafter guesses for each row, one forward verifies the guesses of all rows.

Nothing unverified is committed: `Verify` starts from where the rows are and leaves them there, keys and values go into
pages behind the rows' length. On a GPU the state after each token is kept, and a row goes on from its last true one;
elsewhere only rows whose drafts were all accepted go on (generation/speculative.py), and the next forward feeds the
others' accepted tokens again.
"""

from collections.abc import Sequence
from time import perf_counter

import torch

from statespan.generation.pace import Kind, Pace
from statespan.generation.speculative import MOST_PENDING, SpeculationReport
from statespan.serving.adjustments import Drafts
from statespan.serving.decode import Failed, PlainDecode
from statespan.serving.drafters import LookupDrafter, RowDrafter
from statespan.serving.job import Chosen, Sample
from statespan.serving.runner import Runner
from statespan.serving.verify import Verify


class SpeculativeDecode:
    """A decode step that gives a row several tokens where they were foreseen, and turns itself off where that loses.

    Tokens are those of `PlainDecode`: a draft is accepted where it is the token that the row itself chooses. Rows with
    a constraint, which changes with each token, are not drafted for.

    Args:
        plain: the step for one token a row; it also chooses.
        runner: of the same pool.
        num_drafts: tokens proposed a row and step, at most.
        drafter: where drafts come from; None: prompt look-up.
        adaptive: whether to measure both ways and take the faster one; see `pace`, which says before each step.
    """

    extra_tokens = 0  # a draft stands where one of the tokens to come will

    def __init__(
        self,
        plain: PlainDecode,
        runner: Runner,
        *,
        num_drafts: int = 6,
        drafter: RowDrafter | None = None,
        adaptive: bool = True,
    ) -> None:
        self.report = SpeculationReport()
        self._plain, self._runner, self._pool, self._num_drafts = plain, runner, runner.pool, num_drafts
        self.drafter, self._verify = drafter or LookupDrafter(), Verify(runner, 1 + num_drafts)
        self.pace = Pace() if adaptive else None
        self.clock = perf_counter  # by which both ways are measured
        self._speculated = False  # in the last step
        self._ended_s, self._rows, self._prefilled = 0.0, frozenset[Sample](), 0  # when the last step ended

    def warm_up(self) -> None:
        """On a GPU, capture the graphs of verify forwards and of drafting now, while no row is in use."""
        self._verify.warm_up()
        self.drafter.warm_up()

    def __call__(self, samples: Sequence[Sample]) -> list[list[Chosen] | Failed]:
        started, unread = self.clock(), self._plain.unread
        speculating = self.pace is None or self.pace.speculates(len(samples))
        settled = self._verify.settled(len(samples))
        # A step that runs ahead is awaited first.
        drafting = speculating and not unread
        drafts = self._propose(samples) if drafting else [()] * len(samples)
        drafted = sum(map(len, drafts))
        waiting = any(len(self._pending(row, sample)) > 1 for row, sample in enumerate(samples))
        if plain := not drafted and not waiting:
            chosen = self._plain(samples, go_on=not speculating)
        else:
            chosen = self._verified(samples, drafts)
        counts = [0 if isinstance(one, Failed) else len(one) for one in chosen]
        report = self.report
        report.plain_steps, report.verify_steps = report.plain_steps + plain, report.verify_steps + (not plain)
        report.tokens, report.drafted = report.tokens + sum(counts), report.drafted + drafted
        report.accepted += sum(max(0, count - 1) for count in counts)
        seconds = self._seconds(started, samples)
        if self.pace is not None and (settled or not drafting):
            kind = Kind.PLAIN if not drafting else Kind.VAIN if plain else Kind.VERIFIED
            # The first step of a way reads what the other did, or begins to run ahead.
            steady = self._speculated if drafting else plain and unread == self._plain.unread
            self.pace.note(len(samples), kind, seconds, sum(counts), steady=steady and speculating == drafting)
        self._speculated = drafting
        return chosen

    def _seconds(self, started: float, samples: Sequence[Sample]) -> float:
        """Of this step, and of what the host did since the last one, unless rows were idle or prompts absorbed."""
        ended, prefilled = self.clock(), self._runner.num_prefilled
        if prefilled == self._prefilled and any(sample in self._rows for sample in samples):
            started = self._ended_s
        self._ended_s, self._rows, self._prefilled = ended, frozenset(samples), prefilled
        return ended - started

    def _pending(self, row: int, sample: Sample) -> list[int]:
        """Tokens that the row has not absorbed, the newest at least."""
        return sample.token_ids[self._pool.num_tokens[row] :]

    @torch.inference_mode()
    def _propose(self, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        return self.drafter.propose(samples, [self._room(row, sample) for row, sample in enumerate(samples)])

    def _room(self, row: int, sample: Sample) -> int:
        """Drafts that a row may have."""
        if sample.constraint is not None or len(self._pending(row, sample)) > MOST_PENDING:
            return 0
        return min(self._num_drafts, sample.options.max_new_tokens - sample.num_new - 1)

    @torch.inference_mode()
    def _verified(self, samples: Sequence[Sample], drafts: Drafts) -> list[list[Chosen] | Failed]:
        """One forward of all rows from where they are; rows whose drafts were all accepted go on."""
        fed = [[*self._pending(row, sample), *drafts[row]] for row, sample in enumerate(samples)]
        found = self._verify(fed, [len(draft) + 1 for draft in drafts])
        chosen = self._plain.choose(found.logits, samples, drafts)
        # Of a row's drafts those before its own last token came true.
        found.commit(
            {
                row: len(fed[row]) - len(drafts[row]) + len(one) - 1
                for row, one in enumerate(chosen)
                if not isinstance(one, Failed)
            }
        )
        return chosen
