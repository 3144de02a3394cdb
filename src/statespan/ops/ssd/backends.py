"""Values and gradients of SSD by the backend that runs: what blocks call, being kernels themselves."""

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients
from statespan.ops.dispatch import resolve
from statespan.ops.ssd import chunked, reference
from statespan.ops.ssd.inputs import Inputs, Options

MAX_TRITON_STATES = 256


def _resolve(inputs: Inputs, backend: str) -> str:
    """The name of the backend that runs."""
    x, states, too_large = inputs.x, inputs.B.shape[3], ()
    if states > MAX_TRITON_STATES:
        too_large = (("triton", f"its kernels hold up to {MAX_TRITON_STATES} states, and B has {states}"),)
    return resolve("ssd", backend, x.device, x.dtype, inputs.dt.dtype, too_large=too_large)


def forward(inputs: Inputs, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """y [b t h p] and the final state [b h p n] of `statespan.ops.ssd`."""
    name = _resolve(inputs, backend)
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "triton":
            from statespan.ops.ssd import triton_backend  # imports Triton, so imported when it runs

            return triton_backend.forward(inputs, options)
        return (reference.ssd if name == "reference" else chunked.forward)(inputs, options)


def fake_forward(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """What `forward` returns, empty."""
    _resolve(inputs, backend)  # a backend that cannot run is told of here, too
    batch, _, heads, head_dim = inputs.x.shape
    state = inputs.x.new_empty((batch, heads, head_dim, inputs.B.shape[3]), dtype=inputs.sum_dtype)
    return inputs.x.new_empty(inputs.x.shape), state


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    inputs: Inputs,
    options: Options,
    backend: str,
    *,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of the inputs that are there, in their order and dtypes.

    Args:
        grad_y, grad_final_state: [b t h p] and [b h p n], the latter in float32 (float64 for float64 inputs).
        into: like x, dt, B and C, get their gradients; rows may be strided.
    """
    name = _resolve(inputs, backend)
    with torch.autocast(inputs.x.device.type, enabled=False):
        if name == "reference":
            found = gradients(
                lambda *tensors: reference.ssd(Inputs(*tensors, segments=inputs.segments), options),
                inputs.differentiable,
                (grad_y, grad_final_state),
            )
        elif name == "triton":
            from statespan.ops.ssd import triton_backend  # imports Triton, so imported when it runs

            found = triton_backend.backward(grad_y, grad_final_state, inputs, options, into)
        else:
            found = chunked.backward(grad_y, grad_final_state, inputs, options)
    if into is not None:
        for place, gradient in zip(into, (found[0], found[1], found[3], found[4]), strict=True):
            if gradient is not None and gradient is not place:
                place.copy_(gradient)
    return [gradient for gradient in found if gradient is not None]
