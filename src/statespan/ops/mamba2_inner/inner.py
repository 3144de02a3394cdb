"""Values and gradients of `mamba2_inner`, by the kernels of the ops that it is made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.causal_conv1d import _backward as conv_backward
from statespan.ops.causal_conv1d import _forward as conv_forward
from statespan.ops.custom_op import gradients
from statespan.ops.rms_norm import _gated_backward as norm_backward
from statespan.ops.rms_norm import _gated_forward as norm_forward
from statespan.ops.ssd import _backward as ssd_backward
from statespan.ops.ssd import _forward as ssd_forward


@dataclass(frozen=True)
class Inner:
    """The inputs of `mamba2_inner`, in its order."""

    zxBCdt: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor | None
    initial_conv: Tensor | None
    initial_state: Tensor | None
    segments: Tensor | None
    num_groups: int
    norm_epsilon: float
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
        return conv_forward(xBC, self.conv_weight, self.conv_bias, self.initial_conv, self.segments, True, "auto")

    def ssd(self, mixed: Tensor, dt: Tensor) -> tuple[Any, ...]:
        """The arguments of ssd, given the conv's output."""
        inner, conv, heads = self.sizes
        half = (conv - inner) // 2
        x, B, C = mixed.split([inner, half, half], dim=-1)
        groups = (self.num_groups, half // self.num_groups)
        tensors = (x.unflatten(-1, (heads, -1)), dt, self.A_log.exp().neg_())
        tensors += (B.unflatten(-1, groups), C.unflatten(-1, groups), self.D, self.dt_bias, self.initial_state)
        return *tensors, self.segments, True, self.dt_min, self.dt_max, self.chunk_size, self.discretization, "auto"

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        """norm(y silu(z)), or without a norm y silu(z)."""
        if self.norm is None:
            return y * F.silu(z)
        return norm_forward(y, z, self.norm, self.norm_epsilon, self.norm_size, self.norm_before_gate, "auto")

    def gate_gradients(self, grad: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, z and the norm's weight."""
        if self.norm is None:
            return *gradients(lambda y, z: (y * F.silu(z),), (y, z), (grad,)), None
        options = (self.norm_epsilon, self.norm_size, self.norm_before_gate, "auto")
        return norm_backward(grad, y, z, self.norm, *options)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gated output, the final states, and with `keep` ssd's output."""
    *inputs, keep = arguments
    inner = Inner(*inputs)
    with torch.autocast(inner.zxBCdt.device.type, enabled=False):
        z, xBC, dt = inner.split()
        mixed, final_conv = inner.conv(xBC)
        y, final_state = ssd_forward(*inner.ssd(mixed, dt))
        y = y.flatten(-2)
        return inner.gate(y, z), final_conv, final_state, y if keep else y.new_empty(0)


def backward(
    grad_gated: Tensor | None, grad_conv: Tensor | None, grad_state: Tensor | None, y: Tensor, *inputs: Any
) -> list[Tensor]:
    """The gradients of the inputs that are there, in their order."""
    inner = Inner(*inputs)
    with torch.autocast(inner.zxBCdt.device.type, enabled=False):
        z, xBC, dt = inner.split()
        mixed, final_conv = inner.conv(xBC)
        if grad_gated is None:
            grad_gated = torch.zeros_like(y)
        grad_y, grad_z, grad_norm = inner.gate_gradients(grad_gated, y, z)
        assert grad_y is not None and grad_z is not None
        arguments = inner.ssd(mixed, dt)
        if grad_state is None:
            wide = torch.promote_types(y.dtype, torch.float32)
            x, B = arguments[0], arguments[3]
            grad_state = y.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=wide)
        found = ssd_backward(grad_y.unflatten(-1, arguments[0].shape[2:]), grad_state, *arguments)
        grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, *grad_initial = found
        grad_mixed = torch.cat([grad_x.flatten(2), grad_B.flatten(2), grad_C.flatten(2)], dim=-1)
        conv_inputs = (xBC, inner.conv_weight, inner.conv_bias, inner.initial_conv, inner.segments)
        grad_conv = torch.zeros_like(final_conv) if grad_conv is None else grad_conv
        grad_zxBCdt = torch.empty_like(inner.zxBCdt, memory_format=torch.contiguous_format)
        of_z, of_xBC, of_dt = grad_zxBCdt.split(list(inner.sizes), dim=-1)
        of_z.copy_(grad_z)
        of_dt.copy_(grad_dt)
        _, grad_conv_weight, grad_conv_bias, grad_initial_conv = conv_backward(
            grad_mixed, grad_conv, *conv_inputs, True, "auto", of_xBC
        )
        all_found = (
            grad_zxBCdt,
            grad_conv_weight,
            None if inner.conv_bias is None else grad_conv_bias,
            grad_bias,
            grad_A.mul_(arguments[2]),
            grad_D,
            grad_norm,
            None if inner.initial_conv is None else grad_initial_conv,
            *grad_initial,
        )
        return [gradient for gradient in all_found if gradient is not None]
