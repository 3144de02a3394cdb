"""What a Mamba-1 mixer does between its outer projections, values and gradients, by the kernels of the ops of it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.causal_conv1d import backends as conv_backends
from statespan.ops.mixer_block import Middle, of_weight
from statespan.ops.rms_norm.backends import backward as norm_backward
from statespan.ops.rms_norm.backends import forward as norm_forward
from statespan.ops.selective_scan import backends as scan_backends
from statespan.ops.selective_scan.inputs import Inputs, Options


@dataclass(frozen=True)
class Inner:
    """in_proj's output [x|z], and the other inputs in the op's order."""

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
    epsilon: float
    discretization: str
    x_low: Tensor  # x_proj and dt_proj in the dtype of the products
    dt_low: Tensor

    def conv(self) -> tuple[Tensor, Tensor]:
        """u [b t d], and the conv's final state."""
        x = self.xz[..., : self.A_log.shape[0]]
        tensors = (x, self.conv_weight, self.conv_bias, self.initial_conv, self.segments)
        return conv_backends.forward(*tensors, True, "auto")

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
        return norm_forward(part, weight, self.epsilon, self.xz.dtype, "auto")

    def scan(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Inputs, Options]:
        """The scan's arguments; dt after dt_proj."""
        z = self.xz[..., self.A_log.shape[0] :]
        tensors = (u, dt, A, B.unsqueeze(2), C.unsqueeze(2), self.D, z, self.dt_bias, self.initial_state, self.segments)
        return Inputs(*tensors), Options(True, self.discretization)


def forward(inner: Inner, keep: int) -> tuple[Tensor, ...]:
    """y [b t d], the final states, and what is kept: u, x_proj's output, A and the scan's states."""
    u, final_conv = inner.conv()
    selected = F.linear(u, inner.x_low)
    dt, B, C = inner.normed(selected)
    A = inner.A_log.exp().neg_()
    scan = inner.scan(u, F.linear(dt, inner.dt_low), A, B, C)
    y, final_state, starts = scan_backends.forward(*scan, keep > 0, "auto")
    kept = (selected, A) if keep else (y.new_empty(0), A.new_empty(0))
    return y, final_conv, final_state, u if keep == 3 else u.new_empty(0), *kept, starts


def fake(inner: Inner, keep: int) -> tuple[Tensor, ...]:
    """What `forward` returns, empty."""
    xz, (channels, states) = inner.xz, inner.A_log.shape
    u, B = xz.new_empty(*xz.shape[:2], channels), xz.new_empty(*xz.shape[:2], 1, states)
    scan = Inputs(u, u, inner.A_log, B, B, None, u, None, None)
    y, final_state, starts = scan_backends.fake_forward(scan, keep > 0, "auto")
    final_conv = xz.new_empty(xz.shape[0], inner.conv_weight.shape[1] - 1, channels)
    selected = xz.new_empty((*xz.shape[:2], inner.x_proj.shape[0]) if keep else 0)
    A = inner.A_log.new_empty(inner.A_log.shape if keep else 0)
    return y, final_conv, final_state, u if keep == 3 else u.new_empty(0), selected, A, starts


def backward(
    inner: Inner,
    grad_y: Tensor,
    grad_conv: Tensor | None,
    grad_state: Tensor | None,
    u: Tensor,
    selected: Tensor,
    A: Tensor,
    starts: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """y [b t d] again, and the gradients of the tensors of `inner` but the segments, in their order."""
    u = u if u.numel() else inner.conv()[0]
    dt, B, C = inner.normed(selected)
    scan = inner.scan(u, F.linear(dt, inner.dt_low), A, B, C)
    grad_xz = torch.empty_like(inner.xz, memory_format=torch.contiguous_format)
    (x, _), (grad_x, grad_z) = inner.xz.chunk(2, dim=-1), grad_xz.chunk(2, dim=-1)
    y = torch.empty_like(u)
    grad_selected = torch.empty_like(selected)
    of_dt, *of_matrices = inner.split(grad_selected)
    into_B, into_C = (matrix.unsqueeze(2) for matrix in of_matrices)
    into = (into_B, into_C) if inner.dt_norm is None else None  # behind norms B and C lie elsewhere
    found = scan_backends.backward(
        grad_y, grad_state, starts, *scan, "auto", into_z=grad_z, into_y=y, into_matrices=into, of_log=True
    )
    grad_u, grad_dt, grad_A_log, grad_B, grad_C, grad_D, _, grad_bias, *grad_initial = found
    grad_norms: tuple[Tensor | None, ...] = (None, None, None)
    if into is None:
        gradients = (grad_dt @ inner.dt_low, grad_B.squeeze(2), grad_C.squeeze(2))
        grad_selected, grad_norms = _through_norms(inner, selected, *gradients)
    else:
        torch.mm(grad_dt.flatten(0, 1), inner.dt_low, out=of_dt.flatten(0, 1))
    conv_inputs = (x, inner.conv_weight, inner.conv_bias, inner.initial_conv, inner.segments)
    of_conv = conv_backends.backward_behind(grad_u, grad_selected, inner.x_low, grad_conv, *conv_inputs, grad_x)
    _, grad_conv_weight, grad_conv_bias, grad_initial_conv = of_conv
    return y, (
        grad_xz,
        grad_conv_weight,
        None if inner.conv_bias is None else grad_conv_bias,
        of_weight(grad_selected, u, inner.x_proj.dtype),
        *grad_norms,
        of_weight(grad_dt, dt, inner.dt_proj.dtype),
        grad_bias,
        grad_A_log,
        grad_D,
        None if inner.initial_conv is None else grad_initial_conv,
        *(grad_initial or [None]),
    )


def _through_norms(inner: Inner, selected: Tensor, *gradients: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradient of x_proj's output, and those of the norms' weights, from those of dt, B and C behind the norms."""
    norms = (inner.dt_norm, inner.B_norm, inner.C_norm)
    pairs = [
        norm_backward(gradient, None, part, norm, inner.epsilon, "auto")  # type: ignore[arg-type]  # three norms
        for gradient, part, norm in zip(gradients, inner.split(selected), norms, strict=True)
    ]
    return torch.cat([pair[0] for pair in pairs], dim=-1), tuple(pair[1] for pair in pairs)


MIDDLE = Middle(
    inputs=Inner,
    tensors=(
        "Tensor conv_weight, Tensor? conv_bias, Tensor x_proj, Tensor? dt_norm, Tensor? B_norm, Tensor? C_norm,"
        " Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? initial_conv, Tensor? initial_state,"
        " Tensor? segments"
    ),
    options="float epsilon, str discretization",
    forward=forward,
    fake=fake,
    backward=backward,
    num_kept=4,
    matrices=(2, 6),
)
