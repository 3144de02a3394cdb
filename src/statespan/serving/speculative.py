"""Speculation in the engine: prompt look-up drafts for each row, one forward verifies those of all rows.

Nothing unverified is kept (generation/speculative.py): `StatePool.state` gives copies of the constant states, keys and
values go into pages behind the rows' length, and only rows whose drafts were all accepted are stored. The others stay
where they are, and the next forward feeds their accepted tokens again.
"""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from statespan.generation.drafters import PromptLookup, TextIndex
from statespan.generation.pace import Pace
from statespan.generation.speculative import MOST_PENDING, SpeculationReport
from statespan.layers.state import ModelState
from statespan.serving.decode import Failed, PlainDecode
from statespan.serving.job import Chosen, Sample
from statespan.serving.runner import Runner


class SpeculativeDecode:
    """A decode step that gives a row several tokens where they were foreseen, and turns itself off where that loses.

    Tokens are those of `PlainDecode`: a draft is accepted where it is the token that the row itself chooses. Rows with
    a constraint or a repetition penalty, which change with each token, are not drafted for.

    Args:
        plain: the step for one token a row; it also chooses.
        runner: of the same pool.
        num_drafts: tokens proposed a row and step, at most.
        lookup: where drafts come from; None: PromptLookup().
        adaptive: whether to measure both ways and take the faster one.
    """

    extra_tokens = 0  # a draft stands where one of the tokens to come will

    def __init__(
        self,
        plain: PlainDecode,
        runner: Runner,
        *,
        num_drafts: int = 6,
        lookup: PromptLookup | None = None,
        adaptive: bool = True,
    ) -> None:
        self.report = SpeculationReport()
        self._plain, self._model, self._pool = plain, runner.model, runner.pool
        self._num_drafts, self._lookup = num_drafts, lookup or PromptLookup()
        self._pace = Pace() if adaptive else None
        self._indices: dict[Sample, TextIndex] = {}

    def __call__(self, samples: Sequence[Sample]) -> list[list[Chosen] | Failed]:
        started = perf_counter()
        drafts = self._propose(samples)
        drafted = sum(map(len, drafts))
        if plain := not drafted and all(len(self._pending(row, sample)) == 1 for row, sample in enumerate(samples)):
            chosen = self._plain(samples)
        else:
            chosen = self._verify(samples, drafts)
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

    def _propose(self, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
        if self._pace is not None and not self._pace.speculating:
            return [()] * len(samples)
        self._indices = {sample: self._indices.get(sample) or TextIndex(self._lookup) for sample in samples}
        return [self._draft(row, sample) for row, sample in enumerate(samples)]

    def _draft(self, row: int, sample: Sample) -> tuple[int, ...]:
        left = sample.options.max_new_tokens - sample.num_new
        count = min(self._num_drafts, left - 1)
        changes = sample.constraint is not None or sample.seen is not None
        if changes or count < 1 or len(self._pending(row, sample)) > MOST_PENDING:
            return ()
        return self._indices[sample].find(sample.token_ids, count)

    @torch.inference_mode()
    def _verify(self, samples: Sequence[Sample], drafts: Sequence[tuple[int, ...]]) -> list[list[Chosen] | Failed]:
        """One forward of all rows from where they are; rows whose drafts were all accepted go on."""
        fed = [[*self._pending(row, sample), *drafts[row]] for row, sample in enumerate(samples)]
        logits, after = self._forward(fed, 1 + max(map(len, drafts)))
        chosen = self._accept(logits, samples, drafts)
        whole = [
            row
            for row, (one, draft) in enumerate(zip(chosen, drafts, strict=True))
            if not isinstance(one, Failed) and len(one) == len(draft) + 1
        ]
        if len(whole) < len(samples):
            after = after.select(torch.tensor(whole, dtype=torch.int64))
        if whole:
            self._pool.store(whole, after, [len(fed[row]) for row in whole])
        return chosen

    def _forward(self, rows: Sequence[Sequence[int]], num_logits: int) -> tuple[Tensor, ModelState]:
        """Feed the first rows, padded on the left: logits [n num_logits v] at the last places, and the next states."""
        model, longest = self._model, max(num_logits, *map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
        segments = None
        if any(len(row) < longest for row in rows):
            padding = longest - torch.tensor([len(row) for row in rows])
            segments = torch.where(torch.arange(longest) < padding[:, None], -1, 0).to(model.device)
        hidden = model.embedding(ids.to(model.device)).to(model.stream_dtype)
        hidden, after, _, _ = model.backbone(hidden, self._pool.state(range(len(rows))), segments)
        assert after is not None  # a state went in
        return model.head(hidden[:, -num_logits:]).float(), after

    def _accept(
        self, logits: Tensor, samples: Sequence[Sample], drafts: Sequence[tuple[int, ...]]
    ) -> list[list[Chosen] | Failed]:
        """Each row's own tokens up to the first that was not drafted, place by place for all rows that get there."""
        chosen: list[list[Chosen]] = [[] for _ in samples]
        failed: dict[int, Failed] = {}
        rows, place = list(range(len(samples))), 0
        while rows:
            ends = [logits.shape[1] - 1 - len(drafts[row]) + place for row in rows]
            at = logits[torch.tensor(rows, device=logits.device), torch.tensor(ends, device=logits.device)]
            going: list[int] = []
            for row, one in zip(rows, self._plain.choose(at, [samples[row] for row in rows]), strict=True):
                if isinstance(one, Failed):
                    failed[row] = one
                    continue
                chosen[row].append(one)
                if drafts[row][place : place + 1] == (one.token_id,):
                    going.append(row)
            rows, place = going, place + 1
        return [failed.get(row, tokens) for row, tokens in enumerate(chosen)]
