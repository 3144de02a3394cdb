"""Speculation in the engine: a drafter guesses for each row, one forward verifies the guesses of all rows.

Nothing unverified is kept (generation/speculative.py): `Verify` starts from where the rows are and leaves them there,
keys and values go into pages behind the rows' length, and only rows whose drafts were all accepted are committed. The
others stay where they are, and the next forward feeds their accepted tokens again.
"""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from statespan.generation.pace import Pace
from statespan.generation.speculative import MOST_PENDING, SpeculationReport
from statespan.serving.adjustments import Drafts
from statespan.serving.decode import Failed, PlainDecode
from statespan.serving.drafters import LookupDrafter, RowDrafter
from statespan.serving.job import Chosen, Sample
from statespan.serving.runner import Runner
from statespan.serving.transfer import to_device
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
        adaptive: whether to measure both ways and take the faster one.
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
        self._plain, self._pool, self._num_drafts = plain, runner.pool, num_drafts
        self.drafter, self._verify = drafter or LookupDrafter(), Verify(runner, 1 + num_drafts)
        self._pace = Pace() if adaptive else None

    def __call__(self, samples: Sequence[Sample]) -> list[list[Chosen] | Failed]:
        started = perf_counter()
        drafts = self._propose(samples)
        drafted = sum(map(len, drafts))
        if plain := not drafted and all(len(self._pending(row, sample)) == 1 for row, sample in enumerate(samples)):
            chosen = self._plain(samples)
        else:
            chosen = self._verified(samples, drafts)
        counts = [0 if isinstance(one, Failed) else len(one) for one in chosen]
        report = self.report
        report.plain_steps, report.verify_steps = report.plain_steps + plain, report.verify_steps + (not plain)
        report.tokens, report.drafted = report.tokens + sum(counts), report.drafted + drafted
        report.accepted += sum(max(0, count - 1) for count in counts)
        if self._pace is not None:
            self._pace.note(not plain, perf_counter() - started, sum(counts))
        return chosen

    def _pending(self, row: int, sample: Sample) -> list[int]:
        """Tokens that the row has not absorbed, the newest at least."""
        return sample.token_ids[self._pool.num_tokens[row] :]

    @torch.inference_mode()
    def _propose(self, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        if self._pace is not None and not self._pace.speculating:
            return [()] * len(samples)
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
        found = self._verify(fed)
        chosen = self._plain.choose(_places(found.logits, drafts), samples, drafts)
        whole = [
            row
            for row, (one, draft) in enumerate(zip(chosen, drafts, strict=True))
            if not isinstance(one, Failed) and len(one) == len(draft) + 1
        ]
        found.commit(whole, [len(fed[row]) for row in whole])
        return chosen


def _places(logits: Tensor, drafts: Drafts) -> Tensor:
    """Logits [m v] at the places that count, of logits [n t v] of rows that end together."""
    longest = logits.shape[1]
    rows = [row for row, draft in enumerate(drafts) for _ in range(len(draft) + 1)]
    ends = [place for draft in drafts for place in range(longest - len(draft) - 1, longest)]
    if len(rows) == len(drafts) * longest:
        return logits.flatten(0, 1)[: len(rows)]
    return logits[to_device(rows, torch.int64, logits.device), to_device(ends, torch.int64, logits.device)]
