"""The chunked SSD on GPUs: the backend's two passes and the launches that may be tuned."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from statespan.ops.gpu import shared_memory
from statespan.ops.ssd.inputs import Inputs, Options
from statespan.ops.ssd.triton_backward import gradients
from statespan.ops.ssd.triton_forward import outputs
from statespan.ops.ssd.triton_plan import Launch, Plan, Sizes, padded, sizes_that_fit
from statespan.ops.triton_kernels import on, power_of_two
from statespan.ops.tuning import Tunable


def sizes_for(x: Tensor, states: int) -> Sizes:
    """The sizes that fit this GPU, with the tuning table's launches where it has some."""
    large, item_bytes = shared_memory(x.device) >= 160 << 10, max(2, x.element_size())
    sizes = sizes_that_fit(item_bytes, states, large)
    if not large or item_bytes != 2:
        return sizes
    launches = {tunable.name.removeprefix("ssd."): tunable.best(x.device, power_of_two(states)) for tunable in TUNABLES}
    return replace(sizes, **{kernel: Launch(**tuned) for kernel, tuned in launches.items()})


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """y and the final state of `statespan.ops.ssd`."""
    x = inputs.x
    of_state = torch.Size((x.shape[0], *x.shape[2:], inputs.B.shape[3]))
    if x.numel() == 0:  # no rows
        return x.new_empty(x.shape), x.new_empty(of_state, dtype=torch.float32)
    with on(x.device):
        sizes = sizes_for(x, inputs.B.shape[3])
        y, state = outputs(Plan(padded(inputs, sizes), options, sizes))
    return _cut(y, x.shape), _cut(state, of_state)


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    inputs: Inputs,
    options: Options,
    into: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, dt, A, B, C, D, dt_bias and initial_state in their dtypes; None where the input is None.

    Those of x, dt, B and C are in `into`, where it is given and nothing is padded; its last dimensions are contiguous.
    """
    if inputs.x.numel() == 0:
        return tuple(None if value is None else value.new_zeros(value.shape) for value in inputs.differentiable)
    sizes = sizes_for(inputs.x, inputs.B.shape[3])
    whole = padded(inputs, sizes)
    more_dims, more_states = whole.x.shape[3] - inputs.x.shape[3], whole.B.shape[3] - inputs.B.shape[3]
    if more_dims or more_states:
        grad_y, grad_final = F.pad(grad_y, (0, more_dims)), F.pad(grad_final, (0, more_states, 0, more_dims))
    if into is None or whole is not inputs:
        x, dt, B, C = (
            torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (whole.x, whole.dt, whole.B, whole.C)
        )
        into = x, dt, B, C
    with on(inputs.x.device):
        found = gradients(Plan(whole, options, sizes), grad_y, grad_final, into)
    return tuple(
        None if gradient is None or value is None else _cut(gradient, value.shape).to(value.dtype)
        for gradient, value in zip(found, inputs.differentiable, strict=True)
    )


def _cut(value: Tensor, shape: torch.Size) -> Tensor:
    """What was there before it was padded."""
    return value if value.shape == shape else value[tuple(map(slice, shape))].contiguous()


def _trial(backwards: bool) -> Callable[[torch.device, int], Callable[[], object]]:
    def trial(device: torch.device, states: int) -> Callable[[], object]:
        x, grad = (torch.randn(8, 2048, 24, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
        dt, A = torch.rand(8, 2048, 24, dtype=torch.bfloat16, device=device), -torch.rand(24, device=device)
        B, C = (torch.randn(8, 2048, 1, states, dtype=torch.bfloat16, device=device) for _ in range(2))
        inputs, options = Inputs(x, dt, A, B, C, A, A, None, None), Options(True, (0.0, math.inf), 256, "mamba")
        if backwards:
            grad_final = torch.zeros(8, 24, 64, states, device=device)
            return lambda: backward(grad, grad_final, inputs, options)
        return lambda: forward(inputs, options)

    return trial


_LAUNCHES = {"warps": (4, 8), "stages": (1, 2, 3)}
TUNABLES = (
    Tunable("ssd.outputs", (64, 128, 256), _trial(False), **_LAUNCHES),
    Tunable("ssd.states", (64, 128, 256), _trial(True), **_LAUNCHES),
    Tunable("ssd.gradients", (64, 128, 256), _trial(True), **_LAUNCHES),
    Tunable("ssd.columns", (64, 128, 256), _trial(True), **_LAUNCHES),
)
