"""The causal depthwise convolution, token by token over a sliding window: the truth the other backends are held to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.causal_conv1d`, differentiable by autograd; O(t) Python steps."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(dtype)
    window = x.new_zeros(batch, taps - 1, channels, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if segments is None:
        segments = torch.zeros(batch, length, dtype=torch.int64, device=x.device)
    current = torch.full_like(segments[:, :1], -1, dtype=torch.int64)  # [b 1]; -1: no real token was seen yet
    outputs = []
    for t in range(length):
        segment = segments[:, t : t + 1]
        real = segment >= 0
        restarts = real & (current >= 0) & (segment != current)
        current = torch.where(real, segment, current)

        token = x[:, t].to(dtype).masked_fill(~real, 0.0)
        window = window.masked_fill(restarts[..., None], 0.0)
        extended = torch.cat([window, token[:, None]], dim=1)  # [b k d], oldest first
        y = (extended * weight.t()).sum(1)
        if bias is not None:
            y = y + bias.to(dtype)
        if silu:
            y = F.silu(y)
        outputs.append(y.masked_fill(~real, 0.0))
        window = torch.where(real[..., None], extended[:, 1:], window)
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    return y.to(x.dtype), window.to(x.dtype)


def causal_conv1d_update(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """One token: y and the next window of `statespan.ops.causal_conv1d_update`."""
    y, state = causal_conv1d(x[:, None], weight, bias, state, None, silu)
    return y[:, 0], state
