"""Packed and padded rows: each run of tokens of one segment is a sequence of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.lti.convolution import causal_convolution
from statespan.ops.segments import PADDING, run_numbers, token_marks


@dataclass(frozen=True)
class Runs:
    """Which tokens are real, and the number of each one's run in its row; the initial state enters run 0."""

    real: Tensor  # [b t] bool
    number: Tensor  # [b t] int64

    @classmethod
    def of(cls, segments: Tensor) -> "Runs":
        """The runs of `segments` [b t]."""
        return cls(token_marks(segments) != PADDING, run_numbers(segments))

    @property
    def first(self) -> Tensor:
        """[b t] bool: the real tokens of run 0."""
        return self.real & (self.number == 0)

    @property
    def only(self) -> Tensor:
        """[b] bool: whether run 0 is the row's last."""
        return self.number[:, -1] == 0

    def convolve(self, u: Tensor, kernel: Tensor) -> Tensor:
        """Each run of u [b t d] convolved with kernel [d t], those of similar lengths in one batch; padding gives 0."""
        rows = torch.arange(len(u), device=u.device).unsqueeze(1)
        _, counts = torch.unique_consecutive((rows * u.shape[1] + self.number)[self.real], return_counts=True)
        starts = counts.cumsum(0) - counts
        tokens = u[self.real]
        places, pieces = [counts.new_empty(0)], [tokens.new_empty(0, u.shape[2])]
        for size in {1 << (count - 1).bit_length() for count in counts.tolist()}:
            chosen = (counts <= size) & (2 * counts > size)
            offset = torch.arange(size, device=u.device)
            inside = offset < counts[chosen].unsqueeze(1)
            place = (starts[chosen].unsqueeze(1) + offset)[inside]
            padded = u.new_zeros(*inside.shape, u.shape[2]).masked_scatter(inside.unsqueeze(-1), tokens[place])
            places.append(place)
            pieces.append(causal_convolution(padded, kernel)[inside])
        out = torch.zeros_like(tokens).index_copy(0, torch.cat(places), torch.cat(pieces))
        return torch.zeros_like(u).masked_scatter(self.real.unsqueeze(-1), out)

    def spread_over_first(self, response: Tensor) -> Tensor:
        """`response` [b d t], told by the place in run 0, at the tokens of run 0: [b t d], 0 elsewhere."""
        place = (self.first.cumsum(dim=1) - 1).clamp(min=0).unsqueeze(1).expand_as(response)
        return torch.where(self.first.unsqueeze(-1), response.gather(2, place).transpose(1, 2), 0)

    def last_at_the_end(self, u: Tensor) -> Tensor:
        """u [b t d] with nothing but the row's last run, in its order at the end."""
        last = self.real & (self.number == self.number[:, -1:])
        order = last.to(torch.int8).argsort(dim=1, stable=True).unsqueeze(-1).expand_as(u)
        return torch.where(last.unsqueeze(-1), u, 0).gather(1, order)
