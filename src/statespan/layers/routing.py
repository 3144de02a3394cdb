"""What a router of experts counts, and the two ways in which training keeps experts evenly used: capacity, Sinkhorn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterMetrics:
    """What one router did with one batch of tokens; the losses are computed when asked for, and differentiable.

    Padding counts nowhere. Choices are counted before the capacity drops any.
    """

    logits: Tensor  # [t e] float32
    scores: Tensor  # [t e] float32, after softmax or sigmoid
    chosen: Tensor  # [t k] int64, the router's choices; -1 for padding
    served: Tensor  # [t k] int64, the choices that an expert took; -1 for padding and dropped ones

    @property
    def load_balance_loss(self) -> Tensor:
        """E * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4), a float32 scalar.

        f_e is the number of choices of expert e a token and P_e the mean score of e, each token's scores summing
        to 1. The f_e sum to top_k, so perfect balance is top_k (1 for Switch), as in Hugging Face's Jamba.
        """
        frequency = self._counts() / self._num_tokens()
        share = self.scores / self.scores.sum(-1, keepdim=True)
        return self.scores.shape[1] * (frequency * self._mean(share)).sum()

    @property
    def router_z_loss(self) -> Tensor:
        """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5), a float32 scalar."""
        return self._mean(self.logits.logsumexp(-1).square())

    @property
    def expert_share(self) -> Tensor:
        """[e] float32, each expert's fraction of the choices; sums to 1."""
        return self._counts() / self._num_choices()

    @property
    def dropped_fraction(self) -> Tensor:
        """Fraction of the choices beyond their expert's capacity, a float32 scalar."""
        return (self.served != self.chosen).sum().to(self.scores.dtype) / self._num_choices()

    def _num_tokens(self) -> Tensor:
        return (self.chosen[:, 0] >= 0).sum().clamp(min=1)

    def _num_choices(self) -> Tensor:
        return (self.chosen >= 0).sum().clamp(min=1)

    def _mean(self, values: Tensor) -> Tensor:
        real = (self.chosen[:, 0] >= 0).view(-1, *[1] * (values.dim() - 1))
        return torch.where(real, values, 0.0).sum(0) / self._num_tokens()

    def _counts(self) -> Tensor:
        return _membership(self.chosen, self.scores.shape[1]).sum(0).to(self.scores.dtype)


def drop_overflow(chosen: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """Replace by -1 the choices that find their expert full (Switch, arXiv 2101.03961, section 2.2).

    Args:
        chosen: [t k], int64. Choices in the order in which experts take them, row by row; -1 asks for nothing.
        num_experts: number of experts e.
        capacity_factor: an expert takes ceil(capacity_factor * (choices that are not -1) / e) of them (in float32).
    Returns:
        [t k], int64.
    """
    choices = chosen.flatten()
    membership = _membership(chosen, num_experts)
    rank = (membership.cumsum(0) * membership).sum(1)  # 1 for the first choice of an expert
    capacity = ((choices >= 0).sum() * capacity_factor / num_experts).ceil()
    return torch.where(rank > capacity, -1, choices).view_as(chosen)


def sinkhorn(logits: Tensor, real: Tensor | None, iterations: int) -> Tensor:
    """Balance exp(logits) between experts: log(d0_t exp(logits_te) d1_e) with rows summing to 1/T, columns to 1/E.

    Sinkhorn's alternating normalisation, started as BlackMamba does (arXiv 2402.01771, section 4.2) from
    d1_e = 1 / (E sum_t exp(logits_te)), which already undoes any expert's constant advantage.

    Args:
        logits: [t e], float. Worked on as logarithms, so no size of logits overflows.
        real: [t], bool, or None for all. Other rows have no say in the balance.
        iterations: row-and-column normalisations.
    Returns:
        [t e], the logarithm of the balanced matrix; columns are exact, rows nearly so.
    """
    num_tokens = logits.shape[0] if real is None else real.sum().clamp(min=1)
    log_tokens = torch.as_tensor(num_tokens, dtype=logits.dtype, device=logits.device).log()
    log_experts = math.log(logits.shape[1])

    def column_scale(rows: Tensor) -> Tensor:
        if real is not None:
            rows = rows.masked_fill(~real[:, None], torch.finfo(rows.dtype).min)
        return -log_experts - rows.logsumexp(0)

    log_d0, log_d1 = logits.new_zeros(()), column_scale(logits)
    for _ in range(iterations):
        log_d0 = (-log_tokens - (logits + log_d1).logsumexp(1))[:, None]
        log_d1 = column_scale(logits + log_d0)
    return logits + log_d0 + log_d1


def _membership(index: Tensor, num_experts: int) -> Tensor:
    """[t*k e] bool: which expert each choice asks for; all False for -1."""
    return index.flatten()[:, None] == torch.arange(num_experts, device=index.device)
