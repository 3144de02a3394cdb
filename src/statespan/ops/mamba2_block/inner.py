"""What a Mamba-2 mixer does between its projections, values and gradients, by the kernels of the ops of it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.causal_conv1d import backends as conv_backends
from statespan.ops.custom_op import gradients
from statespan.ops.mixer_block import Middle
from statespan.ops.rms_norm.backends import gated_forward as norm_forward
from statespan.ops.rms_norm.in_block import gated_backward as norm_backward
from statespan.ops.ssd import backends as ssd_backends
from statespan.ops.ssd.inputs import Inputs, Options


@dataclass(frozen=True)
class Inner:
    """in_proj's output [z|xBC|dt], and the other inputs in the op's order."""

    zxBCdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    gate_norm: Tensor | None
    initial_conv: Tensor | None
    initial_state: Tensor | None
    segments: Tensor | None
    num_groups: int
    epsilon: float
    norm_size: int
    norm_before_gate: bool
    dt_min: float
    dt_max: float
    chunk_size: int
    discretization: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of z, of x with B and C, and of dt."""
        conv, heads = self.conv_weight.shape[0], self.A_log.shape[0]
        return self.zxBCdt.shape[-1] - conv - heads, conv, heads

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of z [b t d], x with B and C [b t c], and dt [b t h]."""
        z, xBC, dt = self.zxBCdt.split(list(self.sizes), dim=-1)
        return z, xBC, dt

    def conv(self, xBC: Tensor) -> tuple[Tensor, Tensor]:
        """The conv's output [b t c], and its final state."""
        return conv_backends.forward(
            xBC, self.conv_weight, self.conv_bias, self.initial_conv, self.segments, True, "auto"
        )

    def parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of x [b t h p], B and C [b t g n] in the conv's output, or of their gradients in its gradient."""
        inner, conv, heads = self.sizes
        half = (conv - inner) // 2
        x, B, C = mixed.split([inner, half, half], dim=-1)
        groups = (self.num_groups, half // self.num_groups)
        return x.unflatten(-1, (heads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def ssd(self, mixed: Tensor, dt: Tensor) -> tuple[Inputs, Options]:
        """The arguments of ssd, given the conv's output."""
        x, B, C = self.parts(mixed)
        tensors = (x, dt, self.A_log.exp().neg_(), B, C, self.D, self.dt_bias, self.initial_state, self.segments)
        return Inputs(*tensors), Options(True, (self.dt_min, self.dt_max), self.chunk_size, self.discretization)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """norm(y silu(z)), or without a norm y silu(z)."""
        if self.gate_norm is None:
            return y * F.silu(z)
        return norm_forward(y, z, self.gate_norm, self.epsilon, self.norm_size, self.norm_before_gate, "auto")

    def gate_gradients(
        self, grad: Tensor, y: Tensor, z: Tensor, into_z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gated output once more, the gradients of y and the norm's weight; that of z is written to `into_z`."""
        if self.gate_norm is not None:
            options = (self.epsilon, self.norm_size, self.norm_before_gate)
            return norm_backward(grad, y, z, self.gate_norm, *options, into_z)
        of_y, of_z = gradients(lambda y, z: (y * F.silu(z),), (y, z), (grad,))
        assert of_y is not None and of_z is not None  # neither y nor z is None
        into_z.copy_(of_z)
        return self.gate(y, z), of_y, None


def forward(inner: Inner, keep: int) -> tuple[Tensor, ...]:
    """The gated output, the final states, and what is kept: the conv's output and ssd's."""
    z, xBC, dt = inner.split()
    mixed, final_conv = inner.conv(xBC)
    y, final_state = ssd_backends.forward(*inner.ssd(mixed, dt), "auto")
    y = y.flatten(-2)
    kept = (mixed if keep == 3 else mixed.new_empty(0), y if keep else y.new_empty(0))
    return inner.gate(y, z), final_conv, final_state, *kept


def fake(inner: Inner, keep: int) -> tuple[Tensor, ...]:
    """What `forward` returns, empty."""
    z, xBC, dt = inner.split()
    _, final_state = ssd_backends.fake_forward(inner.ssd(xBC, dt)[0], "auto")
    final_conv = z.new_empty(z.shape[0], inner.conv_weight.shape[1] - 1, xBC.shape[-1])
    kept = (xBC.new_empty(xBC.shape if keep == 3 else (0,)), z.new_empty(z.shape if keep else (0,)))
    return z.new_empty(z.shape), final_conv, final_state, *kept


def backward(
    inner: Inner,
    grad_gated: Tensor,
    grad_conv: Tensor | None,
    grad_state: Tensor | None,
    mixed: Tensor,
    y: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gated output again, and the gradients of the tensors of `inner` but the segments, in their order."""
    z, xBC, dt = inner.split()
    grad_zxBCdt = torch.empty_like(inner.zxBCdt, memory_format=torch.contiguous_format)
    of_z, of_xBC, of_dt = grad_zxBCdt.split(list(inner.sizes), dim=-1)
    mixed = mixed if mixed.numel() else inner.conv(xBC)[0]
    gated, grad_y, grad_norm = inner.gate_gradients(grad_gated, y, z, of_z)
    ssd, options = inner.ssd(mixed, dt)
    of_heads = ssd.x.shape[2:]
    if grad_state is None:
        grad_state = y.new_zeros(y.shape[0], *of_heads, ssd.B.shape[3], dtype=ssd.sum_dtype)
    grad_mixed = torch.empty_like(mixed)
    of_x, of_B, of_C = inner.parts(grad_mixed)
    into = (of_x, of_dt, of_B, of_C)
    found = ssd_backends.backward(grad_y.unflatten(-1, of_heads), grad_state, ssd, options, "auto", into=into)
    _, _, grad_A, _, _, grad_D, grad_bias, *grad_initial = found
    conv_inputs = (xBC, inner.conv_weight, inner.conv_bias, inner.initial_conv, inner.segments)
    of_conv = conv_backends.backward(grad_mixed, grad_conv, *conv_inputs, True, "auto", of_xBC)
    _, grad_conv_weight, grad_conv_bias, grad_initial_conv = of_conv
    return gated, (
        grad_zxBCdt,
        grad_conv_weight,
        None if inner.conv_bias is None else grad_conv_bias,
        grad_bias,
        grad_A.mul_(ssd.A),
        grad_D,
        grad_norm,
        None if inner.initial_conv is None else grad_initial_conv,
        *(grad_initial or [None]),
    )


MIDDLE = Middle(
    inputs=Inner,
    tensors=(
        "Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor? gate_norm,"
        " Tensor? initial_conv, Tensor? initial_state, Tensor? segments"
    ),
    options=(
        "int num_groups, float epsilon, int norm_size, bool norm_before_gate, float dt_min, float dt_max,"
        " int chunk_size, str discretization"
    ),
    forward=forward,
    fake=fake,
    backward=backward,
    num_kept=2,
)
