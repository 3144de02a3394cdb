"""Which drafted tokens a model accepts: exactly the tokens, or the distribution, of decoding without drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.generation.drafters import Draft
from statespan.generation.penalties import History
from statespan.generation.sampling import (
    NonFiniteLogits,
    RandomNumbers,
    Sampling,
    choose,
    pick,
    require_finite,
    weights,
)


@dataclass(frozen=True)
class Verdict:
    """What became of one row's drafts."""

    ids: tuple[int, ...]  # the accepted drafts, and one token more that the model chose itself
    num_drafted: int

    @property
    def num_accepted(self) -> int:
        return len(self.ids) - 1

    @property
    def whole(self) -> bool:
        """Whether every draft was accepted."""
        return self.num_accepted == self.num_drafted


def judge(
    logits: Tensor,
    drafts: Sequence[Draft],
    sampling: Sampling,
    numbers: Sequence[RandomNumbers],
    history: History | None = None,
) -> list[Verdict]:
    """Accept or reject the drafts of several rows (speculative sampling, arXiv 2211.17192, sections 2.2 and 2.3).

    A draft that no chance chose is accepted where it is the token that the model itself draws, with the number that
    plain decoding would use: the paper's probability of acceptance, and the same tokens for a seed. A draft x that was
    drawn from q is accepted with probability min(1, p(x) / q(x)); the token after a rejected one comes from
    max(0, p - q), normalised.

    Args:
        logits: [n v] float32; the rows behind each other: before a row's first draft, and after each of its drafts.
        drafts: one a row.
        sampling: how the model's tokens are chosen.
        numbers: one a row.
        history: what the penalties look at, at each place [n v]; None without any.

    Raises:
        NonFiniteLogits: the largest logit at a place that counts is NaN or infinite.
    """
    logits = sampling.penalize(logits, history)
    if not any(draft.ids for draft in drafts):
        return _without_drafts(logits, sampling, numbers)
    sizes = [len(draft.ids) + 1 for draft in drafts]
    places, best = logits.split(sizes), logits.amax(dim=-1).split(sizes)
    certain = [row for row, draft in enumerate(drafts) if draft.probabilities is None or sampling.greedy]
    own = iter(_choices([places[row] for row in certain], sampling, [numbers[row] for row in certain]))
    verdicts: list[Verdict] = []
    for row, draft in enumerate(drafts):
        if draft.probabilities is None or sampling.greedy:
            ids = _while_equal(draft.ids, next(own))
            numbers[row].use(0 if sampling.greedy else len(ids))
        else:
            ids = _while_accepted(draft.ids, draft.probabilities, weights(places[row], sampling), numbers[row])
        try:
            require_finite(best[row][: len(ids)].tolist())
        except NonFiniteLogits as error:
            raise NonFiniteLogits(row, error.maximum) from None
        verdicts.append(Verdict(ids, len(draft.ids)))
    return verdicts


def _without_drafts(logits: Tensor, sampling: Sampling, numbers: Sequence[RandomNumbers]) -> list[Verdict]:
    """Plain steps come by here: one token a row, at the least cost."""
    drawn = None
    if not sampling.greedy:
        drawn = torch.tensor([source.use()[0] for source in numbers], dtype=torch.float64, device=logits.device)
    ids, best = choose(logits, sampling, drawn)
    require_finite(best.tolist())
    return [Verdict((token,), 0) for token in ids.tolist()]


def _choices(places: Sequence[Tensor], sampling: Sampling, numbers: Sequence[RandomNumbers]) -> list[list[int]]:
    """The token that the model chooses at each place, were it reached."""
    if not places:
        return []
    drawn = None
    if not sampling.greedy:
        each = [number for row, source in zip(places, numbers, strict=True) for number in source.peek(len(row))]
        drawn = torch.tensor(each, dtype=torch.float64, device=places[0].device)
    ids, _ = choose(torch.cat(list(places)) if len(places) > 1 else places[0], sampling, drawn)
    return [row.tolist() for row in ids.cpu().split([len(row) for row in places])]


def _while_equal(drafted: Sequence[int], own: Sequence[int]) -> tuple[int, ...]:
    """The model's own tokens up to the first that was not drafted."""
    same = next((place for place, token in enumerate(drafted) if token != own[place]), len(drafted))
    return tuple(own[: same + 1])


def _while_accepted(
    drafted: Sequence[int], drawn_from: Tensor, likely: Tensor, numbers: RandomNumbers
) -> tuple[int, ...]:
    """Drafts drawn from `drawn_from` [k v] against the model's weights `likely` [k+1 v], which are not normalised."""
    p = (likely / likely.sum(-1, keepdim=True)).double()
    accepted: list[int] = []
    rest = p[-1]
    for place, (token, q) in enumerate(zip(drafted, drawn_from.double(), strict=True)):
        if numbers.use()[0] * float(q[token]) >= float(p[place, token]):
            rest = (p[place] - q).clamp(min=0)
            break
        accepted.append(token)
    chosen = pick(rest.unsqueeze(0), torch.tensor(numbers.use(), dtype=torch.float64, device=rest.device))
    return (*accepted, int(chosen))
