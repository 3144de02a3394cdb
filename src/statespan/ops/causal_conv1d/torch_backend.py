"""The causal depthwise convolution in vectorised PyTorch, for any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.segments import run_numbers


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`, differentiable by autograd."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(batch, taps - 1, channels)
    rows = torch.cat([initial_state.to(x.dtype), x], dim=1)
    if segments is None:
        final_state = rows[:, length:].clone()
        windows = [rows[:, tap : tap + length] for tap in range(taps)]
    else:
        zero = x.new_zeros(batch, 1, channels)
        rows = torch.cat([initial_state.to(x.dtype), x.masked_fill((segments < 0)[..., None], 0.0), zero], dim=1)
        token_rows, state_rows = window_rows(segments, taps)
        final_state = _pick(rows, state_rows)
        windows = [_pick(rows, token_rows[..., tap]) for tap in range(taps)]
    y = torch.zeros(x.shape, dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    for tap, window in enumerate(windows):
        y = y + window.to(dtype) * weight[:, tap].to(dtype)
    if silu:
        y = F.silu(y)
    if segments is not None:
        y = y.masked_fill((segments < 0)[..., None], 0.0)
    return y.to(x.dtype), final_state


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows [b r d] at index [b s] -> [b s d]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def window_rows(segments: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Where each token's window and the final state come from.

    Args:
        segments: [b t], int.
        taps: k, window length.

    Returns:
        Rows of cat([initial state (k-1 rows), x (t rows), one row of zeros]): [b t k] for each token's window and
        [b k-1] for the final state, oldest first. The window of a padding token is meaningless.
    """
    batch, length = segments.shape
    real, runs, history = segments >= 0, run_numbers(segments), taps - 1
    # The visible sequence: the initial state, which belongs to run 0, then the real tokens in their order.
    place = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
    sequence = torch.cat([torch.arange(history, device=place.device).expand(batch, -1), place + history], dim=1)
    sequence_runs = F.pad(runs.gather(1, place), (history, 0))

    count = real.cumsum(1)  # real tokens up to each one: it has the sequence's rows count - 1 .. count - 1 + history
    count, runs = (torch.cat([value, value[:, -1:]], dim=1)[..., None] for value in (count, runs))
    wanted = (count - 1 + torch.arange(taps, device=place.device)).clamp(min=0).flatten(1)
    visible = sequence_runs.gather(1, wanted).view(batch, length + 1, taps) == runs
    rows = torch.where(visible, sequence.gather(1, wanted).view_as(visible), history + length)
    return rows[:, :-1], rows[:, -1, 1:]
