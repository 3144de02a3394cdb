"""Values and gradients of `mamba1_inner`, by the kernels of the ops that it is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.causal_conv1d import _backward as conv_backward
from statespan.ops.causal_conv1d import _forward as conv_forward
from statespan.ops.rms_norm import _backward as norm_backward
from statespan.ops.rms_norm import _forward as norm_forward
from statespan.ops.selective_scan import _backward as scan_backward
from statespan.ops.selective_scan import _forward as scan_forward


@dataclass(frozen=True)
class Inner:
    """The inputs of `mamba1_inner`, in its order."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_norm: Tensor | None
    B_norm: Tensor | None
    C_norm: Tensor | None
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    initial_conv: Tensor | None
    initial_state: Tensor | None
    segments: Tensor | None
    norm_epsilon: float
    discretization: str

    def conv(self) -> tuple[Tensor, Tensor]:
        """u [b t d], and the conv's final state."""
        x = self.xz[..., : self.A_log.shape[0]]
        tensors = (x, self.conv_weight, self.conv_bias, self.initial_conv, self.segments)
        return conv_forward(*tensors, True, "auto")

    def split(self, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of x_proj's output [b t r+2n], or of its gradient: dt [b t r], B and C [b t n]."""
        states = self.A_log.shape[1]
        dt, B, C = selected.split([self.dt_proj.shape[1], states, states], dim=-1)
        return dt, B, C

    def normed(self, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt before dt_proj, B and C, after the inner norms."""
        parts = self.split(selected)
        if self.dt_norm is None:
            return parts
        norms = (self.dt_norm, self.B_norm, self.C_norm)
        dt, B, C = (self._norm(part, norm) for part, norm in zip(parts, norms, strict=True))
        return dt, B, C

    def _norm(self, part: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None  # there are three of them, or none
        return norm_forward(part, weight, self.norm_epsilon, self.x_proj.dtype, "auto")

    def scan(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> list[Any]:
        """The scan's arguments up to the discretization; dt after dt_proj."""
        A, z = self.A_log.exp().neg_(), self.xz[..., self.A_log.shape[0] :]
        tensors = (u, dt, A, B.unsqueeze(2), C.unsqueeze(2), self.D, z, self.dt_bias)
        return [*tensors, self.initial_state, self.segments, True, self.discretization]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final states, and with `keep` what the backward wants: x_proj's output and the scan's states."""
    *inputs, keep = arguments
    inner = Inner(*inputs)
    with torch.autocast(inner.xz.device.type, enabled=False):
        u, final_conv = inner.conv()
        selected = F.linear(u, inner.x_proj)
        dt, B, C = inner.normed(selected)
        scan = inner.scan(u, F.linear(dt, inner.dt_proj), B, C)
        scan_arguments: list[Any] = [*scan, keep, "auto"]
        y, final_state, starts = scan_forward(*scan_arguments)
    return y, final_conv, final_state, selected if keep else y.new_empty(0), starts


def backward(
    grad_y: Tensor | None,
    grad_conv: Tensor | None,
    grad_state: Tensor | None,
    selected: Tensor,
    starts: Tensor,
    *inputs: Any,
) -> list[Tensor]:
    """The gradients of the inputs that are there, in their order."""
    inner = Inner(*inputs)
    with torch.autocast(inner.xz.device.type, enabled=False):
        return [
            found for found in _gradients(inner, grad_y, grad_conv, grad_state, selected, starts) if found is not None
        ]


def _gradients(
    inner: Inner,
    grad_y: Tensor | None,
    grad_conv: Tensor | None,
    grad_state: Tensor | None,
    selected: Tensor,
    starts: Tensor,
) -> tuple[Tensor | None, ...]:
    u, final_conv = inner.conv()
    dt, B, C = inner.normed(selected)
    scan = inner.scan(u, F.linear(dt, inner.dt_proj), B, C)
    arguments: list[Any] = [grad_y, grad_state, starts, *scan, "auto"]
    grad_xz = torch.empty_like(inner.xz, memory_format=torch.contiguous_format)
    (x, _), (grad_x, grad_z) = inner.xz.chunk(2, dim=-1), grad_xz.chunk(2, dim=-1)
    found = scan_backward(*arguments, into_z=grad_z)
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, _, grad_bias, *grad_initial = found
    grad_rank, grad_dt_proj = _through_linear(grad_dt, dt, inner.dt_proj)
    grad_selected, grad_norms = _through_norms(inner, selected, grad_rank, grad_B.squeeze(2), grad_C.squeeze(2))
    rows, tokens = grad_selected.flatten(0, 1), u.flatten(0, 1)
    grad_u = grad_u.flatten(0, 1).addmm_(rows, inner.x_proj).view(u.shape)
    grad_x_proj = rows.T @ tokens
    grad_conv = torch.zeros_like(final_conv) if grad_conv is None else grad_conv
    conv_inputs = (x, inner.conv_weight, inner.conv_bias, inner.initial_conv)
    of_conv = conv_backward(grad_u, grad_conv, *conv_inputs, inner.segments, True, "auto", grad_x)
    _, grad_conv_weight, grad_conv_bias, grad_initial_conv = of_conv
    return (
        grad_xz,
        grad_conv_weight,
        None if inner.conv_bias is None else grad_conv_bias,
        grad_x_proj,
        *grad_norms,
        grad_dt_proj,
        grad_bias,
        grad_A.mul_(scan[2]),
        grad_D,
        None if inner.initial_conv is None else grad_initial_conv,
        *grad_initial,
    )


def _through_linear(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x [.. i] and weight [o i], from that of F.linear(x, weight)."""
    rows = grad.flatten(0, 1)
    return (rows @ weight).view(x.shape), rows.T @ x.flatten(0, 1)


def _through_norms(inner: Inner, selected: Tensor, *gradients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradient of x_proj's output, and those of the norms' weights, from those of dt, B and C behind the norms."""
    if inner.dt_norm is None:
        return torch.cat(gradients, dim=-1), (None, None, None)
    norms = (inner.dt_norm, inner.B_norm, inner.C_norm)
    pairs = [
        norm_backward(gradient, None, part, norm, inner.norm_epsilon, "auto")  # type: ignore[arg-type]  # three norms
        for gradient, part, norm in zip(gradients, inner.split(selected), norms, strict=True)
    ]
    return torch.cat([pair[0] for pair in pairs], dim=-1), tuple(pair[1] for pair in pairs)
