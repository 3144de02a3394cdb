"""Half blocks for more rows than `project.cu` takes: PyTorch's products, and between them few kernels of our own."""

from collections.abc import Callable

import torch
from torch import Tensor

from statespan.ops.activation import activate
from statespan.ops.decode_step.multiply import Multiply, multiplies
from statespan.ops.decode_step.project import TYPES, Convolved, Normed, based
from statespan.ops.decode_step.update import Convolve, Normalize, Recur, Update, mamba2_update
from statespan.ops.decode_step.weights import FeedForwardWeights, HeadWeights, Mamba1Weights, Mamba2Weights, Projection
from statespan.ops.linear import add_product, linear
from statespan.ops.rms_norm import gated_rms_norm, rms_norm

MixerCall = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
HEAD_ROWS = 64  # beyond, a library's product is faster


def mamba1(w: Mamba1Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    channels = w.A_log.shape[0]
    into = _into(w, rows, hidden_dtype, Convolved(0, w.conv_weight, w.conv_bias, conv_dtype))
    recur = _recur(w, rows) or _recur_in_parts(w, rows)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = into(hidden, conv_state)
        y = recur(projected[:, :channels], projected[:, channels:], ssm_state)
        return add(hidden, y, w.out_proj), conv_state, ssm_state

    return step


def _recur(w: Mamba1Weights, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """From x and z to y in two kernels."""
    same = w.norm.dtype == w.x_proj.weight.dtype == w.dt_proj.weight.dtype
    if not (same and multiplies(w.x_proj) and multiplies(w.dt_proj) and Recur.takes(w)):
        return None
    select, recur = Multiply(w.x_proj, rows), Recur(w, rows)

    def run(x: Tensor, z: Tensor, ssm_state: Tensor) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        recur(x, z, select(x), ssm_state, y)
        return y

    return run


def _recur_in_parts(w: Mamba1Weights, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """From x and z to y, product by product."""
    (channels, states), rank = w.A_log.shape, w.dt_proj.weight.shape[1]
    update = Update(w, rows, w.norm.dtype, channels, 1, states)

    def run(x: Tensor, z: Tensor, ssm_state: Tensor) -> Tensor:
        dt, B, C = multiplied(x, w.x_proj).split([rank, states, states], dim=1)
        if w.inner_norms:
            pairs = zip((dt, B, C), w.inner_norms, strict=True)
            dt, B, C = (rms_norm(value, norm, eps=w.inner_norm_epsilon) for value, norm in pairs)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        update(x, z, multiplied(dt, w.dt_proj), B, C, ssm_state, y)
        return y

    return run


def mamba2(w: Mamba2Weights, rows: int, hidden_dtype: torch.dtype, conv_dtype: torch.dtype) -> MixerCall:
    """The prepared step, see `statespan.ops.decode_step.prepare`."""
    inner = w.out_proj.weight.shape[1]
    into = _into(w, rows, hidden_dtype, Convolved(inner, w.conv_weight, w.conv_bias, conv_dtype))
    update = mamba2_update(w, rows, w.norm.dtype)

    def step(hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected = into(hidden, conv_state)
        z = projected[:, :inner]
        y = torch.empty_like(z, memory_format=torch.contiguous_format)
        update(projected, ssm_state, y, None)
        if w.gate_norm is None:
            y = y * torch.nn.functional.silu(z)
        else:
            size, first = w.gate_norm_size, w.norm_before_gate
            y = gated_rms_norm(y, z, w.gate_norm, eps=w.gate_norm_epsilon, group_size=size, norm_before_gate=first)
        return add(hidden, y, w.out_proj), conv_state, ssm_state

    return step


def feed_forward(w: FeedForwardWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The prepared step of an MLP, see `statespan.ops.decode_step.prepare`."""
    normalize = normalizer(Normed(w.norm, w.norm_epsilon), rows, hidden_dtype)

    def step(hidden: Tensor) -> Tensor:
        return add(hidden, activate(multiplied(normalize(hidden), w.up_proj), w.activation), w.down_proj)

    return step


def head(w: HeadWeights, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The prepared step, see `statespan.ops.decode_step.prepare`; None where the layer's own forward must do."""
    if not multiplies(w.projection) or w.norm.dtype != w.projection.weight.dtype:
        return None
    normalize = normalizer(Normed(w.norm, w.norm_epsilon), rows, hidden_dtype)
    if rows > HEAD_ROWS:
        weight, outputs = w.projection.weight.t(), w.outputs
        return lambda hidden: torch.mm(normalize(hidden), weight, out_dtype=torch.float32)[:, :outputs]
    product = Multiply(w.projection, rows, outputs=w.outputs)
    return lambda hidden: product(normalize(hidden))


def normalizer(norm: Normed, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The normalised residual stream, in the dtype of the norm."""
    if norm.weight.dtype in TYPES and based(norm.weight) and norm.weight.shape[0] % 4 == 0:
        return Normalize(norm, rows, hidden_dtype, norm.weight.dtype)
    return lambda hidden: rms_norm(hidden, norm.weight, eps=norm.epsilon)


def _into(
    w: Mamba1Weights | Mamba2Weights, rows: int, hidden_dtype: torch.dtype, conv: Convolved
) -> Callable[[Tensor, Tensor], Tensor]:
    """(residual stream, window): norm, in_proj, and the conv of some of the outputs."""
    normalize = normalizer(Normed(w.norm, w.norm_epsilon), rows, hidden_dtype)
    convolve, end = Convolve(conv, rows, w.norm.dtype), conv.start + conv.weight.shape[0]

    def into(hidden: Tensor, conv_state: Tensor) -> Tensor:
        projected = multiplied(normalize(hidden), w.in_proj)
        convolve(projected[:, conv.start : end], conv_state)
        return projected

    return into


def add(hidden: Tensor, x: Tensor, projection: Projection) -> Tensor:
    """hidden += W x"""
    if projection.scale is None and projection.bias is None and x.dtype == projection.weight.dtype:
        add_product(hidden, x, projection.weight.t())
        return hidden
    return hidden.add_(multiplied(x, projection))


def multiplied(x: Tensor, projection: Projection) -> Tensor:
    return linear(x, projection.weight, projection.bias, scale=projection.scale)
