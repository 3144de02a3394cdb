"""The Triton kernels at tiny shapes in Triton's interpreter, against the references in float64.

Run by test_triton_kernels.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients

Pair = tuple[Tensor | None, Tensor | None]


def wide(*values: Tensor | None) -> list[Tensor | None]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def rms_norm() -> Iterator[Pair]:
    from statespan.ops.rms_norm import reference, triton_backend

    for rows, channels in ((3, 5), (70, 96)):
        x, residual = torch.randn(rows, channels + 3)[:, 1 : 1 + channels], torch.randn(rows, channels)
        weight, grad, total_grad = torch.randn(channels), torch.randn(rows, channels), torch.randn(rows, channels)
        y, total = triton_backend.add_rms_norm(x, residual, weight, 1e-5, torch.float32)
        yield from zip((y, total), reference.add_rms_norm(*wide(x, residual, weight), 1e-5, torch.float64), strict=True)
        yield (
            triton_backend.rms_norm(x, weight, 1e-5, torch.float32),
            reference.rms_norm(*wide(x, weight), 1e-5, torch.float64),
        )
        found = triton_backend.rms_norm_backward(grad, total_grad, x, weight, 1e-5)
        exact = vjp(lambda x, w: (reference.rms_norm(x, w, 1e-5, torch.float64),), (x, weight), (grad,))
        yield from zip(found, (exact[0] + total_grad, exact[1]), strict=True)
        for group_size, before in product((channels, channels // 2 if channels % 2 == 0 else 5), (False, True)):
            options = (1e-5, group_size, before)
            x, z = torch.randn(rows, 2 * channels).split(channels, dim=1)
            yield (
                triton_backend.gated_rms_norm(x, z, weight, *options),
                reference.gated_rms_norm(*wide(x, z, weight), *options),
            )
            yield from zip(
                triton_backend.gated_rms_norm_backward(grad, x, z, weight, *options),
                vjp(lambda *v, o=options: (reference.gated_rms_norm(*v, *o),), (x, z, weight), (grad,)),
                strict=True,
            )


def causal_conv1d() -> Iterator[Pair]:
    from statespan.ops.causal_conv1d import reference, triton_backend

    triton_backend.SEARCH = 4
    triton_backend._strips = lambda x, *_: (-(-x.shape[1] // 6), 6)
    segments = (None, "packed", "anything", "mostly padding")
    for length, taps, kind, state in product((1, 21), (1, 4), segments, (False, True)):
        x, weight, bias = torch.randn(2, length, 41)[..., 1:21], torch.randn(20, taps), torch.randn(20)
        initial = torch.randn(2, taps - 1, 20) if state else None
        numbers = {
            None: None,
            "packed": torch.randint(0, 2, (2, length)).cumsum(1),
            "anything": torch.randint(-1, 3, (2, length)),
            "mostly padding": torch.where(torch.rand(2, length) < 0.8, -1, 1),
        }[kind]
        found = triton_backend.forward(x, weight, bias, initial, numbers, True)
        inputs = (x, weight, bias, initial)
        run = lambda *v, s=numbers: reference.causal_conv1d(*v, s, True)  # noqa: E731  # bound now
        yield from zip(found, run(*wide(*inputs)), strict=True)
        upstream = [torch.randn(value.shape) for value in found]
        yield from zip(
            triton_backend.backward(*upstream, *inputs, numbers, True), vjp(run, inputs, upstream), strict=True
        )
    state, x, weight = torch.randn(3, 3, 20), torch.randn(3, 20), torch.randn(20, 4)
    yield from zip(
        triton_backend.update(state, x, weight, None, True),
        reference.causal_conv1d_update(*wide(state, x, weight), None, True),
        strict=True,
    )


def state_update() -> Iterator[Pair]:
    from statespan.ops.state_update import reference, triton_backend

    for softplus, discretization in product((True, False), ("mamba", "zoh", "bilinear")):
        state, (u, dt, z) = torch.randn(2, 33, 17), torch.randn(2, 100)[:, 1:].split(33, dim=1)
        A, D, bias = -torch.rand(33, 17) * 4 - 0.01, torch.randn(33), torch.randn(33).abs()
        B, C = torch.randn(2, 2, 3, 17).unbind(1)
        arguments = (state, u, dt.abs(), A, B, C, D, z, bias)
        yield from zip(
            triton_backend.selective_state_update(*arguments, softplus, discretization),
            reference.selective_state_update(*wide(*arguments), softplus, discretization),
            strict=True,
        )
        state, x, dt = torch.randn(2, 3, 5, 17), torch.randn(2, 3, 5), torch.randn(2, 3).abs()
        A, bias = -torch.rand(3) * 4 - 0.01, torch.randn(3).abs()
        for D in (None, torch.randn(3), torch.randn(3, 5)):
            arguments = (state, x, dt, A, B, C, D, bias)
            yield from zip(
                triton_backend.ssd_state_update(*arguments, softplus, (0.1, 2.0), discretization),
                reference.ssd_state_update(*wide(*arguments), softplus, (0.1, 2.0), discretization),
                strict=True,
            )


def linear_cross_entropy() -> Iterator[Pair]:
    from statespan.ops.linear_cross_entropy import chunked, in_place, triton_backend

    triton_backend.BLOCK, kernel = 16, triton_backend.losses_and_gradients
    for valid, ignore, scale in product((50, 44), (False, True), (None, torch.randn(37))):
        hidden, weight, labels = torch.randn(37, 12), torch.randn(50, 12), torch.randint(0, 44, (37,))
        if ignore:
            labels[::5] = -100
        options = (labels, -100, valid)
        yield from zip(
            in_place.losses_and_gradients(kernel, 64 * 4 * 7, hidden, weight, *options, scale, True, True),
            chunked.losses_and_gradients(*wide(hidden, weight), *options, *wide(scale), True, True),
            strict=True,
        )


def vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], upstream: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return gradients(function, wide(*inputs), wide(*upstream))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count = 0
    for value, exact in {f.__name__: f for f in (rms_norm, causal_conv1d, state_update, linear_cross_entropy)}[
        sys.argv[1]
    ]():
        assert (value is None) == (exact is None)
        if value is not None and value.numel():
            error = (value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
            assert error < 4e-6, f"value {count}: {error:.2e}"
            count += 1
    print(sys.argv[1], count)


if __name__ == "__main__":
    main()
