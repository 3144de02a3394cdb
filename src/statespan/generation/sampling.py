"""From logits to the next token: penalty, temperature, filters, draw. Pure functions of logits [b v]."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.penalties import History, penalize
from statespan.ops.sampling_edge import sampling_edge

BLOCK = 64  # random numbers of a row that are drawn at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The steps run in the order of the fields.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).greedy
        False
    """

    repetition_penalty: float = 1.0  # logits of tokens seen so far: divided by it if positive, else multiplied
    frequency_penalty: float = 0.0  # taken off a token's logit each time that it was generated
    presence_penalty: float = 0.0  # taken off the logits of all tokens that were generated
    temperature: float = 1.0  # logits are divided by it; 0: the most likely token, always
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the fewest most likely tokens whose probabilities sum to at least this
    min_p: float | None = None  # keep the tokens at least this likely, relative to the most likely one

    def __post_init__(self) -> None:
        _require(self.repetition_penalty > 0, "repetition_penalty must be above 0", self.repetition_penalty)
        for name in ("frequency_penalty", "presence_penalty"):
            _require(math.isfinite(getattr(self, name)), f"{name} must be finite", getattr(self, name))
        _require(0 <= self.temperature < math.inf, "temperature must be finite and at least 0", self.temperature)
        _require(self.top_k is None or self.top_k >= 1, "top_k must be at least 1", self.top_k)
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p)
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p must be 0 to 1", self.min_p)

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0 or self.top_k == 1

    def history(self, shape: tuple[int, int], device: torch.device | str) -> History | None:
        """Of rows [b v] without tokens, where there are penalties."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return None if penalties == (1, 0, 0) else History.empty(shape, device)

    def penalize(self, logits: Tensor, history: History | None) -> Tensor:
        """Logits [b v] after the penalties."""
        if history is None:
            return logits
        return penalize(
            logits,
            history,
            repetition=self.repetition_penalty,
            frequency=self.frequency_penalty,
            presence=self.presence_penalty,
        )


class NonFiniteLogits(UserError):
    """A row's logits have no finite maximum."""

    def __init__(self, row: int, maximum: float) -> None:
        self.row, self.maximum = row, maximum
        super().__init__(f"the logits of row {row} have no finite maximum, it is {maximum}")


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise UserError(f"{rule}, got {value}")


def sample(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], history: History | None = None
) -> Tensor:
    """The next token of each row. A row's token depends on its own logits and generator alone.

    Args:
        logits: [b v], float32.
        sampling: What to do with them.
        generators: One CPU generator a row; each gives one number, or none when greedy.
        history: What the penalties look at; None without any.
    Returns:
        ids [b], int64.
    Raises:
        NonFiniteLogits: a row's largest logit is NaN or infinite.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), Sampling(temperature=0), [torch.Generator()])
        tensor([1])
    """
    numbers = None if sampling.greedy else random_numbers(generators, 1)[0]
    ids, best = choose(logits, sampling, numbers, history)
    require_finite(best.tolist())
    return ids


def choose(
    logits: Tensor, sampling: Sampling, numbers: Tensor | None, history: History | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row, ids [b] int64, and the row's largest logit [b].

    A token means nothing where that is not finite. Nothing here waits for a GPU, so that a CUDA graph can hold it.
    `numbers` [b] float64 are random in [0, 1); None when greedy.
    """
    logits = sampling.penalize(logits, history)
    if numbers is None:
        best, ids = logits.max(dim=-1)
        return ids, best
    return pick(weights(logits, sampling), numbers), logits.amax(dim=-1)


def require_finite(best: Sequence[float]) -> None:
    """Raise NonFiniteLogits for the first row whose largest logit is NaN or infinite."""
    for row, value in enumerate(best):
        if not math.isfinite(value):
            raise NonFiniteLogits(row, value)


def weights(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities of the next token after temperature, top-k, top-p and min-p, relative to the best token's.

    Each filter sees what the one before it kept, renormalised. Tokens that tie with the last kept one stay.

    Returns:
        [b v]: 1 for the most likely token, 0 for dropped ones; not normalised.
    """
    # Shifted before the division: a temperature near 0 must not overflow.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    weights = (logits if sampling.temperature == 1 else logits / sampling.temperature).exp()
    if sampling.top_k is not None or sampling.top_p is not None:
        weights = _at_least(weights, sampling_edge(weights, sampling.top_k, sampling.top_p))
    if sampling.min_p:
        weights = _at_least(weights, sampling.min_p)
    return weights


def _at_least(weights: Tensor, edge: Tensor | float) -> Tensor:
    return weights * (weights >= edge)


def random_numbers(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """[count b] float64 in [0, 1): the next `count` numbers of each row's CPU generator, as one by one."""
    columns = [torch.rand(count, dtype=torch.float64, generator=generator) for generator in generators]
    return torch.stack(columns, dim=1)


class RandomNumbers:
    """The numbers in [0, 1) of one row, in the order in which plain decoding uses them."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._ahead: deque[float] = deque()

    def peek(self, count: int) -> list[float]:
        """The next `count` numbers, which stay the next ones."""
        while len(self._ahead) < count:
            self._ahead.extend(random_numbers([self._generator], BLOCK)[:, 0].tolist())
        return [self._ahead[place] for place in range(count)]

    def use(self, count: int = 1) -> list[float]:
        """The next `count` numbers, which are used up."""
        numbers = self.peek(count)
        for _ in range(count):
            self._ahead.popleft()
        return numbers


def draw(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a row, as likely as its weight [b v], at a random number of the row."""
    return pick(weights, random_numbers(generators, 1)[0])


def pick(weights: Tensor, numbers: Tensor) -> Tensor:
    """The token [b] where the cumulative sum of the row's weights [b v] passes its number in [0, 1) times the whole.

    Numerics: the sum is float64, so that rare tokens keep their share; on a device without it the CPU draws. The number
        is below 1 by more than rounding can undo, so what stands behind the end of the sum is never drawn.
    """
    mass = (weights.cpu() if weights.device.type == "mps" else weights).cumsum(dim=-1, dtype=torch.float64)
    target = numbers.to(mass.device).unsqueeze(1) * mass[:, -1:]
    place = torch.searchsorted(mass, target, right=True).squeeze(-1)
    return place.clamp_(max=weights.shape[-1] - 1).to(weights.device)  # the end where weights are NaN


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of the raw logits [b v]: the model's own distribution, before penalty, temperature and filters."""
    return logits.float().log_softmax(dim=-1)
