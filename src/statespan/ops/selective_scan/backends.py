"""Values and gradients of the scan by the backend that runs: what blocks call, being kernels themselves."""

from typing import Any

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients
from statespan.ops.dispatch import resolve
from statespan.ops.gpu import GRID_ROWS
from statespan.ops.selective_scan import reference
from statespan.ops.selective_scan.inputs import Inputs, Options

MAX_CUDA_STATES = 128  # of a channel


def _resolve(inputs: Inputs, backend: str) -> str:
    """The name of the backend that runs."""
    rows, states, too_large = inputs.u.shape[0], inputs.B.shape[3], ()
    if states == 0:
        too_large = tuple((kernels, "its kernels want one state a channel at least") for kernels in ("cuda", "triton"))
    elif states > MAX_CUDA_STATES:
        too_large = (("cuda", f"its kernels hold up to {MAX_CUDA_STATES} states a channel, and B has {states}"),)
    elif rows > GRID_ROWS:
        too_large = (("cuda", f"its kernels take up to {GRID_ROWS} rows, and u has {rows}"),)
    types = (x.dtype for x in (inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z) if x is not None)
    return resolve("selective_scan", backend, inputs.u.device, *types, too_large=too_large)


def _module(name: str) -> Any:
    """The compiled backend of that name, or None; loaded when it runs."""
    if name == "cpu":
        from statespan.ops.selective_scan import cpu

        return cpu
    if name == "cuda":
        from statespan.ops.selective_scan import cuda_backend

        return cuda_backend
    if name == "triton":
        from statespan.ops.selective_scan import triton_backend

        return triton_backend
    return None


def forward(inputs: Inputs, options: Options, keep_starts: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y [b t d] and the final state [b d n] of `statespan.ops.selective_scan`, and what is kept for `backward`.

    That is the state before each chunk of so many steps, float32 in the backend's own layout (its `starts_shape`): an
    empty tensor without `keep_starts`, or where the reference runs.
    """
    compiled = _module(_resolve(inputs, backend))
    if compiled is not None:
        return compiled.selective_scan(inputs, options, keep_starts)
    return (*reference.selective_scan(inputs, options), inputs.u.new_empty(0))


def fake_forward(inputs: Inputs, keep_starts: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, empty."""
    u, A, compiled = inputs.u, inputs.A, _module(_resolve(inputs, backend))
    dtype = torch.promote_types(u.dtype, torch.float32)
    y, final_state = u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=dtype)
    if compiled is None:
        return y, final_state, u.new_empty(0)
    return y, final_state, u.new_empty(compiled.starts_shape(u, A, keep_starts), dtype=torch.float32)


def backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    starts: Tensor,
    inputs: Inputs,
    options: Options,
    backend: str,
    *,
    into_z: Tensor | None = None,
    into_y: Tensor | None = None,
    into_matrices: tuple[Tensor, Tensor] | None = None,
    of_log: bool = False,
) -> list[Tensor]:
    """The gradients of the inputs that are there, in their order and dtypes; grad_y and grad_final may be None: zeros.

    Args:
        grad_y, grad_final: [b t d] and [b d n].
        starts: what `forward` kept of these inputs, by the same backend.
        into_z: [b t d], gets the gradient of z, which is returned, too.
        into_y: [b t d], gets y once more, so that nobody needs to keep it.
        into_matrices: [b t g n] each, get the gradients of B and C; beside each other in rows of one tensor, as B and
            C are.
        of_log: the gradient of A is that of log(-A).
    """
    u, name = inputs.u, _resolve(inputs, backend)
    compiled = _module(name)
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    if name == "cuda":
        into = (into_z, into_y, into_matrices, of_log)
        found = compiled.gradients(grad_y, grad_final, starts, inputs, options, *into)
    elif compiled is not None:
        found = compiled.gradients(grad_y, grad_final, starts, inputs, options)
    else:
        if grad_final is None:
            dtype = torch.promote_types(u.dtype, torch.float32)
            grad_final = u.new_zeros(u.shape[0], *inputs.A.shape, dtype=dtype)
        found = gradients(
            lambda *tensors: reference.selective_scan(Inputs(*tensors, segments=inputs.segments), options),
            inputs.differentiable,
            (grad_y, grad_final),
        )
    if into_y is not None and (name != "cuda" or inputs.z is None):
        into_y.copy_(forward(inputs, options, False, backend)[0])
    found = list(found)
    if of_log and name != "cuda" and found[2] is not None:
        found[2] = found[2] * inputs.A
    for number, place in zip((6, 3, 4), (into_z, *(into_matrices or (None, None))), strict=True):
        gradient = found[number]
        if place is not None and gradient is not None and gradient is not place:
            found[number] = place.copy_(gradient)
    pairs = zip(inputs.differentiable, found, strict=True)
    return [gradient.to(value.dtype) for value, gradient in pairs if value is not None and gradient is not None]
