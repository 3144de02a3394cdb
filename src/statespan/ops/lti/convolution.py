"""Causal convolution by the FFT."""

import torch
from torch import Tensor

from statespan.ops.arguments import check_dim, check_shape


def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_{k <= t} kernel_k u_{t-k}, one kernel a channel, in O(t log t).

    Args:
        u: [b t d], float.
        kernel: [d l], float. Taps beyond t are not used; a shorter kernel ends.

    Returns:
        y [b t d] in the dtype of kernel, differentiable.

    Raises:
        UserError: shapes disagree.

    Numerics: zero-padded so that nothing wraps round, in kernel's dtype (at least float32). The error is relative to
    the largest terms of a channel: at 1e-7 of those in float32, small outputs beside large ones lose digits.
    """
    check_dim("causal_convolution", "u", u, "[b t d]")
    check_shape("causal_convolution", "kernel", kernel, "[d l]", (u.shape[2], kernel.shape[-1]))
    length = u.shape[1]
    kernel = kernel[:, :length]
    size = _fast_size(length + kernel.shape[1] - 1)
    spectrum = torch.fft.rfft(u.transpose(1, 2).to(kernel.dtype), n=size)
    y = torch.fft.irfft(spectrum * torch.fft.rfft(kernel, n=size), n=size)
    return y[..., :length].transpose(1, 2)


def _fast_size(least: int) -> int:
    """The smallest 2^i, 3 2^i or 5 2^i from `least` on: FFTs of large prime factors are slow."""
    return min(factor << max(0, -(-least // factor) - 1).bit_length() for factor in (1, 3, 5))
