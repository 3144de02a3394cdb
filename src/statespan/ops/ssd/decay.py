"""Decays of the chunked SSD: what each token's step does to the state, and products of steps inside a chunk.

Heads are [g r], r heads in each of g groups; t is the whole time, q the tokens of one chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.ops.segments import run_numbers
from statespan.ops.ssd.inputs import Options
from statespan.ops.state_update.reference import discretize, step_size

TINY = 1e-20  # stands for a decay of exactly zero ("bilinear") where its logarithm is taken


@dataclass(frozen=True)
class Steps:
    """The recurrence h_t = a_t h_{t-1} + scale_t x_t B_t^T, token by token."""

    log_decay: Tensor  # [b t h], log |a|
    scale: Tensor  # [b t h]; 0 for padding
    sign: Tensor | None  # [b t h], of a, where a may be negative
    run: Tensor | None  # [b t], tokens of different runs do not see each other


def steps(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, segments: Tensor | None, options: Options, dtype: torch.dtype
) -> Steps:
    """What the arguments of `statespan.ops.ssd` make of each token, computed in `dtype`, differentiable."""
    dt, A = step_size(dt.to(dtype), dt_bias, options.dt_softplus, options.dt_limit), A.to(dtype)
    if segments is not None:
        dt = dt.masked_fill((segments < 0)[..., None], 0.0)  # such a step leaves the state as it is
    run = None if segments is None else run_numbers(segments)
    decay, scale = discretize(dt, A, options.discretization)
    if options.discretization != "bilinear":
        return Steps(dt * A, scale, None, run)
    decay = decay + torch.where(decay == 0, TINY, 0.0)
    return Steps(decay.abs().log(), scale, decay.detach().sign(), run)


class Chunk:
    """Products of decays in the tokens from start to stop; zero across a restart of the state.

    Attributes:
        scale: [b g q r 1].
        from_start: [b g q r 1], from the state before the chunk to the token.
        to_end: [b g q r 1], from the token to the state after the chunk.
        across: [b g r 1 1], from the state before to the state after.
    """

    def __init__(self, steps: Steps, groups: int, start: int, stop: int) -> None:
        self.time = slice(start, stop)
        self.dtype = steps.scale.dtype
        # Small differences of large sums matter: float64 keeps them (MPS has none).
        wide = self.dtype if steps.scale.device.type == "mps" else torch.float64
        self.sum = steps.log_decay[:, self.time].to(wide).cumsum(1)  # [b q h]
        from_start, to_end = self.sum.exp(), (self.sum[:, -1:] - self.sum).exp()
        self.sign = self.same_run = None
        if steps.sign is not None:
            self.sign = steps.sign[:, self.time].cumprod(1)
            from_start, to_end = from_start * self.sign, to_end * (self.sign * self.sign[:, -1:])
        if steps.run is not None:
            run = steps.run[:, self.time, None]  # [b q 1]
            before = steps.run[:, start - 1 : start, None] if start else 0
            from_start, to_end = from_start * (run == before), to_end * (run == run[:, -1:])
            self.same_run = (run == run.mT)[:, None]  # [b 1 q q]
        self.groups = groups
        self.scale, self.from_start, self.to_end = (
            value.to(self.dtype).unflatten(2, (groups, -1)).transpose(1, 2)[..., None]
            for value in (steps.scale[:, self.time], from_start, to_end)
        )
        self.across = self.from_start[:, :, -1, :, :, None]

    def cut(self, tensor: Tensor) -> Tensor:
        """The chunk's part of [b g t ..]."""
        return tensor[:, :, self.time]

    def within(self) -> Tensor:
        """[b g r q q], from source token (last) to target token; 1 where the source is later, blind to restarts."""
        total = self.sum.mT.contiguous()  # [b h q]
        product = (total[..., :, None] - total[..., None, :]).to(self.dtype).tril_().exp_()
        if self.sign is not None:
            product *= self.sign.mT[..., :, None] * self.sign.mT[..., None, :]
        return product.unflatten(1, (self.groups, -1))

    def mask_(self, pairs: Tensor) -> Tensor:
        """[b g q q] set to zero, in place, where the target token does not see the source."""
        pairs.tril_()
        return pairs if self.same_run is None else pairs.mul_(self.same_run)
