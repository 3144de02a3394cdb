"""The Triton kernels at tiny shapes in Triton's interpreter, against the references in float64.

Run by test_triton_kernels.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is imported.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor

from statespan.ops.custom_op import gradients

Pair = tuple[Tensor | None, Tensor | None]


def patch_once() -> None:
    """Triton's language is made the interpreter's once for each module of kernels.

    The interpreter does it again for every function that a kernel calls, which takes half of the time.
    """
    from triton.runtime import interpreter

    patch, modules = interpreter._patch_lang, set[str]()

    def once(function: FunctionType) -> SimpleNamespace:
        module = function.__globals__["__name__"]
        if module not in modules:
            modules.add(module)
            patch(function)
        return SimpleNamespace(restore=lambda: None)  # it stays: nothing else runs here

    interpreter._patch_lang = once


def wide(*values: Tensor | None) -> list[Tensor | None]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def weights() -> Iterator[Pair]:
    from statespan.ops.triton_kernels.weights import add_rows, cast, sum_of_parts

    given = [torch.randn(shape) for shape in ((70, 130), (3, 2), (5000,), (1, 1))]
    for count in range(1, 5):
        yield from ((found, x) for found, x in zip(cast(torch.float64, given[:count]), wide(*given), strict=False))
    for rows, columns, split in ((1, 5, 5), (130, 70, 70), (64, 100, 33)):
        parts = torch.randn(rows, columns)
        outputs = [torch.full((size,), torch.nan) for size in (split, columns - split) if size]
        sum_of_parts(parts, *outputs)
        yield torch.cat(outputs), parts.double().sum(0)
    for most, count, columns in ((3, 40, 5), (30, 20, 600), (1, 8, 4), (1, 1, 3)):
        ids, added, total = (
            torch.randint(0, most, (count,)),
            torch.randn(count, columns),
            torch.randn(most + 2, columns),
        )
        exact = total.double().index_add(0, ids, added.double())
        add_rows(total, ids, added)
        yield total, exact
    from statespan.ops.tied_embedding import _TiedEmbedding

    ids, weight, other = torch.randint(0, 6, (2, 30)), torch.randn(9, 11, requires_grad=True), torch.randn(2, 30, 9)
    exact = weight.detach().double().requires_grad_()
    rows, head = _TiedEmbedding.apply(ids, weight)
    loss = ((rows @ head.T) * other).sum()
    wanted = torch.autograd.grad(((exact[ids] @ exact.T) * other.double()).sum(), exact)
    yield from ((torch.autograd.grad(loss, weight, retain_graph=True)[0], wanted[0]) for _ in range(2))


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
        again, rounded = torch.full_like(grad, torch.nan), torch.full_like(grad, torch.nan)
        found += triton_backend.rms_norm_backward(grad, total_grad, x, weight, 1e-5, rounded, again)
        exact = vjp(lambda x, w: (reference.rms_norm(x, w, 1e-5, torch.float64),), (x, weight), (grad,))
        normal = reference.rms_norm(*wide(x, weight), 1e-5, torch.float64)
        exact = (exact[0] + total_grad, exact[1])
        yield from zip((*found, rounded, again), (*exact, *exact, exact[0], normal), strict=True)
        inverses = torch.full((rows,), torch.nan)
        weight[1] = 0
        y = triton_backend.rms_norm(x, weight, 1e-5, torch.float32, inverses)
        exact = vjp(lambda x, w: (reference.rms_norm(x, w, 1e-5, torch.float64),), (x, weight), (grad,))
        found = triton_backend.rms_norm_backward(grad, total_grad, y, weight, 1e-5, rounded, None, inverses)
        yield from zip((*found, rounded), (exact[0] + total_grad, exact[1], exact[0] + total_grad), strict=True)
        for group_size, before in product((channels, channels // 2 if channels % 2 == 0 else 5), (False, True)):
            options = (1e-5, group_size, before)
            x, z = torch.randn(rows, 2 * channels).split(channels, dim=1)
            yield (
                triton_backend.gated_rms_norm(x, z, weight, *options),
                reference.gated_rms_norm(*wide(x, z, weight), *options),
            )
            found = triton_backend.gated_rms_norm_backward(grad, x, z, weight, *options)
            exact = vjp(lambda *v, o=options: (reference.gated_rms_norm(*v, *o),), (x, z, weight), (grad,))
            again, into_z = torch.full_like(grad, torch.nan), torch.full((rows, 2 * channels), torch.nan)[:, channels:]
            found += triton_backend.gated_rms_norm_backward(grad, x, z, weight, *options, into_z, again)
            normal = reference.gated_rms_norm(*wide(x, z, weight), *options)
            yield from zip((*found, into_z, again), (*exact, *exact, exact[1], normal), strict=True)


def causal_conv1d() -> Iterator[Pair]:
    from statespan.ops.causal_conv1d import reference, triton_backend

    triton_backend.SEARCH = 4
    triton_backend._strips = lambda shape, *_: (-(-shape[1] // 6), 6)
    segments = (None, "packed", "anything", "mostly padding", "unsigned")
    for length, taps, kind, state in product((1, 21), (1, 4), segments, (False, True)):
        x, weight, bias = torch.randn(2, length, 41)[..., 1:21], torch.randn(20, taps), torch.randn(20)
        initial = torch.randn(2, taps - 1, 20) if state else None
        numbers = segments_of(kind, length)
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


def selective_scan() -> Iterator[Pair]:
    from statespan.ops.selective_scan import reference, triton_backend
    from statespan.ops.selective_scan.inputs import Inputs, Options

    triton_backend.EVERY = 4
    triton_backend.FORWARD._forced = {"tile": 16, "unroll": 2}
    triton_backend.BACKWARD._forced = {"tile": 16, "programs": 4}
    triton_backend.multiprocessors = lambda device: 1
    shapes = ((1, 6, 1, 5), (7, 6, 2, 3), (7, 10, 1, 4))
    for number, ((length, channels, groups, states), kind) in enumerate(
        product(shapes, (None, "packed", "anything", "mostly padding"))
    ):
        discretization = ("mamba", "zoh", "bilinear")[number % 3]
        whole, softplus = number % 2 == 0, number % 5 != 0
        u, z = torch.randn(2, length, 2 * channels).chunk(2, dim=-1)
        dt = torch.randn(2, length, channels) if softplus else torch.rand(2, length, channels)
        A = -torch.rand(channels, states) * 2 - 0.01
        B, C = torch.randn(2, length, 2, groups, states).unbind(2)
        D, bias, initial = torch.randn(channels), torch.rand(channels), torch.randn(2, channels, states)
        inputs = (u, dt, A, B, C, *((D, z, bias, initial) if whole else (None, None, None, None)))
        given, options = Inputs(*inputs, segments_of(kind, length)), Options(softplus, discretization)
        *found, starts = triton_backend.selective_scan(given, options, True)
        run = lambda *v, n=given.segments, o=options: reference.selective_scan(Inputs(*v, n), o)  # noqa: E731  # bound now
        yield from zip(found, run(*wide(*inputs)), strict=True)
        upstream = [torch.randn(value.shape) for value in found]
        grads = triton_backend.gradients(*upstream, starts, given, options)
        for value, exact in zip(grads, vjp(run, inputs, upstream), strict=True):
            yield (None if exact is None else value), exact


def segments_of(kind: str | None, length: int) -> Tensor | None:
    """Segment numbers [2 t] of a kind; None for none."""
    if kind == "packed":
        return torch.randint(0, 2, (2, length)).cumsum(1)
    if kind == "anything":
        return torch.randint(-1, 3, (2, length))
    if kind == "unsigned":
        return torch.randint(0, 2, (2, length)).cumsum(1).to(torch.uint8)
    return None if kind is None else torch.where(torch.rand(2, length) < 0.8, -1, 1)


def linear_cross_entropy() -> Iterator[Pair]:
    from statespan.ops.linear_cross_entropy import chunked, in_place, triton_backend

    triton_backend.LOSS._forced, kernel = {"block": 16, "warps": 4}, triton_backend.losses_and_gradients
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


def grouped_mlp_of_many() -> Iterator[Pair]:
    """Where tiles come by descriptors: sizes that no tile divides, an expert without rows, dropped choices."""
    from statespan.ops.grouped_mlp import by_expert, triton_backend, triton_backward, triton_many
    from statespan.ops.grouped_mlp.experts import Experts

    serves, tile, group = triton_many.serves, triton_many.TILE, triton_many.GROUP
    triton_many.serves, triton_many.TILE = lambda *_: True, triton_many.Tile(32, 16, 16, 2, 1)
    triton_many.GROUP, triton_many.SCHEDULE_VALUES = 2, 64
    for activation, bias, top_k in (("swiglu", True, 2), ("gelu", False, 1)):
        triton_many.hopper = lambda device, plain=bias: not plain
        up_size = 80 if activation == "swiglu" else 40
        index = torch.randint(-1, 4, (50, top_k))
        index[index == 2] = 1
        x, weight, grad = torch.randn(50, 24), torch.randn(50, top_k), torch.randn(50, 24)
        biases = (torch.randn(4, up_size), torch.randn(4, 24)) if bias else (None, None)
        experts = (torch.randn(4, up_size, 24), torch.randn(4, 24, 40), *biases)
        y, kept = triton_backend.forward(x, index, weight, Experts(*experts), activation, True)
        alone, _ = triton_backend.forward(x, index, weight, Experts(*experts), activation, False)
        exact_inputs = (*wide(x), index, *wide(weight), Experts(*wide(*experts)), activation)
        exact, exact_kept = by_expert.forward(*exact_inputs, True)
        yield from ((y, exact), (alone, exact))
        found = triton_backward.backward(grad, kept, x, index, weight, Experts(*experts), activation)
        yield from zip(found, by_expert.backward(*wide(grad), exact_kept, *exact_inputs), strict=True)
    triton_many.serves, triton_many.TILE, triton_many.GROUP = serves, tile, group


def grouped_mlp() -> Iterator[Pair]:
    from statespan.ops.grouped_mlp import by_expert, triton_backend, triton_backward, triton_many, triton_routing
    from statespan.ops.grouped_mlp.experts import Experts

    torch.set_deterministic_debug_mode("error")  # new tensors are NaN
    triton_backend.UNALIGNED = triton_backend.Tile(16, 16, 16, 2, 1)
    triton_backend._stream = lambda weight, rows, size: triton_backend.Tile(16, rows, 16, 2, 1)
    triton_backend.multiprocessors = lambda device: 40
    triton_routing.SORT_VALUES, triton_routing.SORT_PROGRAMS, triton_backend.GROUP = 64, 3, 2
    for (activation, bias), tokens in product((("swiglu", True), ("gelu", False), ("relu", True)), (2, 40)):
        up_size = 40 if activation == "swiglu" else 20
        index = torch.randint(-1, 4, (tokens, 3))
        index[index == 2] = 1
        x, weight, grad = torch.randn(tokens, 25)[:, 1:23], torch.randn(tokens, 3), torch.randn(tokens, 22)
        biases = (torch.randn(4, up_size), torch.randn(4, 22)) if bias else (None, None)
        experts = (torch.randn(4, up_size, 22), torch.randn(4, 22, 20), *biases)
        y, kept = triton_backend.forward(x, index, weight, Experts(*experts), activation, True)
        alone, _ = triton_backend.forward(x, index, weight, Experts(*experts), activation, False)
        exact_inputs = (*wide(x), index, *wide(weight), Experts(*wide(*experts)), activation)
        exact, exact_kept = by_expert.forward(*exact_inputs, True)
        yield from ((y, exact), (alone, exact))
        found = triton_backward.backward(grad, kept, x, index, weight, Experts(*experts), activation)
        yield from zip(found, by_expert.backward(*wide(grad), exact_kept, *exact_inputs), strict=True)
    yield from grouped_mlp_of_many()
    int8, scale = torch.randint(-127, 128, (3, 32, 32), dtype=torch.int8), torch.rand(3, 32) / 127
    x, index, weight = torch.randn(5, 32), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    y, _ = triton_backend.forward(x, index, weight, Experts(int8, int8, None, None, scale, scale), "silu", False)
    exact_weights = int8.double() * scale[..., None].double()
    exact_inputs = (*wide(x), index, *wide(weight), Experts(exact_weights, exact_weights, None, None), "silu")
    yield y, by_expert.forward(*exact_inputs, False)[0]
    triton_many.WIDENED, triton_many.WIDEN_BLOCK = 1, 256
    yield triton_many.widened(int8, x.half(), 1), int8.double()
    index, x, weight = torch.randint(-1, 4, (40, 1)), torch.randn(40, 22), torch.rand(40, 2)[:, :1]
    index[3], experts = 4, (torch.randn(4, 20, 22), torch.randn(4, 22, 20), None, torch.randn(4, 22))
    triton_backend.multiprocessors = lambda device: 4  # so that one choice a token needs no adding up
    y, _ = triton_backend.forward(x, index, weight, Experts(*experts), "relu", False)
    assert y[3].isnan().all()
    served = index[:, 0] < 4
    exact_inputs = (*wide(x[served]), index[served], *wide(weight[served]), Experts(*wide(*experts)), "relu")
    yield y[served], by_expert.forward(*exact_inputs, False)[0]
    triton_backend.multiprocessors = lambda device: 40
    experts = (torch.randn(2, 288, 6), torch.randn(2, 6, 144), torch.randn(2, 288), torch.randn(2, 6))
    x, index, weight = torch.randn(2, 6), torch.tensor([[0], [-1]]), torch.rand(2, 1)
    y, _ = triton_backend.forward(x, index, weight, Experts(*experts), "geglu", False)  # in two splits
    yield y, by_expert.forward(*wide(x), index, *wide(weight), Experts(*wide(*experts)), "geglu", False)[0]


def decode_attention() -> Iterator[Pair]:
    from statespan.ops.decode_attention import reference, triton_backend
    from statespan.ops.decode_attention.paged import append_token

    torch.set_deterministic_debug_mode("error")  # new tensors are NaN
    triton_backend.SLOTS = 16
    for (heads, kv_heads, head_dim), window, (programs, used) in product(
        ((4, 2, 16), (20, 1, 24)), (None, 5), ((1, 53), (20, 53), (20, 20))
    ):
        triton_backend.PROGRAMS = programs
        query, cache = torch.randn(2, heads, head_dim), torch.randn(2, 60, 2 * kv_heads, head_dim + 3)[..., :head_dim]
        position, length = torch.randint(-1, 60, (2, 60), dtype=torch.int32), torch.tensor([used], dtype=torch.int32)
        cache[:, used:] = float("nan")
        key, value = cache.chunk(2, dim=2)
        newest = torch.tensor([59, 20], dtype=torch.int32)
        options = (position, length, newest, window, 0.3)
        yield (
            triton_backend.decode_attention(query, key, value, *options),
            reference.decode_attention(*wide(query, key, value), *options),
        )
    lengths = torch.tensor([53, 0, 7], dtype=torch.int32)
    for (heads, kv_heads), window, programs, page_size in product(((4, 2), (20, 1)), (None, 18), (1, 40), (1, 6, 32)):
        triton_backend.PROGRAMS = programs
        pages, most = torch.full((200, page_size, 2 * kv_heads, 24), float("nan")), -(-60 // page_size)
        table = torch.randperm(199)[: 3 * most].view(3, most).int() + 1
        for row, used in enumerate(lengths.tolist()):
            slot = torch.arange(used - min(used, window or used), used)
            pages[table[row][slot // page_size].long(), slot % page_size] = torch.randn(len(slot), 2 * kv_heads, 24)
        arguments = (torch.randn(3, heads, 24), *pages.chunk(2, dim=2), table, lengths, window, 0.3)
        yield (
            triton_backend.paged_decode_attention(*arguments),
            reference.paged_decode_attention(*wide(*arguments[:3]), *arguments[3:]),
        )
    for half, interleaved in ((0, False), (5, False), (5, True), (12, True)):
        pages = torch.zeros(2, 7, 4, 2, 24)
        slot, angle = torch.tensor([9, 27, 0]), torch.randn(3, half)
        angles = (angle.cos(), angle.sin()) if half else None
        qkv = torch.randn(3, 8 * 24)
        query = triton_backend.append_token(qkv.view(3, 8, 24), *pages, slot, angles, interleaved)
        exact = torch.zeros(2, 7, 4, 2, 24)
        yield query, append_token(qkv, *exact, slot, angles, interleaved=interleaved, backend="torch")
        yield pages, exact


def ssd() -> Iterator[Pair]:
    from statespan.ops.ssd import reference, triton_backend, triton_plan
    from statespan.ops.ssd.inputs import Inputs, Options

    launch = triton_plan.Launch(4, 1)
    sizes = triton_plan.Sizes(16, 16, launch, launch, launch, launch)
    triton_backend.sizes_for, triton_plan.STEP_HEADS, triton_plan.PART_N = (lambda x, states: sizes), 4, 16
    cases = ((37, "mamba", None, 1), (37, "zoh", "packed", 99), (20, "bilinear", "anything", 1), (1, "mamba", None, 1))
    for place, (length, discretization, kind, processors) in enumerate(cases):
        triton_plan.multiprocessors = lambda device, count=processors: count
        x, dt = torch.randn(2, length, 4, 25)[..., 1:21], torch.randn(2, length, 4)
        A, (D, bias) = -torch.rand(4) * 4 - 0.05, torch.randn(2, 4)
        B, C = torch.randn(2, length, 2, 2, 20).unbind(2)
        D, initial = (torch.randn(4, 20) if place % 2 else D), (torch.randn(2, 4, 20, 20) if place else None)
        tensors, numbers = (x, dt, A, B, C, D, bias, initial), segments_of(kind, length)
        options = Options(True, (0.1, 2.0), 256, discretization)
        run = lambda *v, n=numbers, o=options: reference.ssd(Inputs(*v, n), o)  # noqa: E731  # bound now
        inputs = Inputs(*tensors, numbers)
        found = triton_backend.forward(inputs, options)
        yield from zip(found, run(*wide(*tensors)), strict=True)
        upstream = [torch.randn(value.shape) for value in found]
        grads = triton_backend.backward(*upstream, inputs, options)
        yield from zip(grads, vjp(run, tensors, upstream), strict=True)
    run = lambda *v: reference.ssd(Inputs(*v, None), options)  # noqa: E731
    for processors in (1, 99):  # gradients in places that are given
        triton_plan.multiprocessors = lambda device, count=processors: count
        x, dt, (B, C) = torch.randn(2, 21, 4, 16), torch.randn(2, 21, 4), torch.randn(2, 2, 21, 2, 32)
        tensors = (x, dt, -torch.rand(4) - 0.05, B, C, torch.randn(4), torch.randn(4), torch.randn(2, 4, 16, 32))
        upstream = [torch.randn(2, 21, 4, 16), torch.randn(2, 4, 16, 32)]
        whole = torch.full((2, 21, 4 * 16 + 4 + 2 * 2 * 32 + 3), torch.nan)
        of_x, of_dt, of_B, of_C, rest = whole.split([64, 4, 64, 64, 3], dim=-1)
        into = (of_x.unflatten(-1, (4, 16)), of_dt, of_B.unflatten(-1, (2, 32)), of_C.unflatten(-1, (2, 32)))
        grads = triton_backend.backward(*upstream, Inputs(*tensors, None), options, into)
        assert all(place is found for place, found in zip(into, (*grads[:2], *grads[3:5]), strict=True))
        assert rest.isnan().all()
        yield from zip(grads, vjp(run, tensors, upstream), strict=True)


def vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor | None], upstream: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return gradients(function, wide(*inputs), wide(*upstream))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    patch_once()
    count = 0
    groups = (
        weights,
        rms_norm,
        causal_conv1d,
        state_update,
        selective_scan,
        linear_cross_entropy,
        grouped_mlp,
        decode_attention,
        ssd,
    )
    for value, exact in {group.__name__: group for group in groups}[sys.argv[1]]():
        assert (value is None) == (exact is None)
        if value is not None and value.numel():
            error = (value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3)
            assert error < 4e-6, f"value {count}: {error:.2e}"
            count += 1
    print(sys.argv[1], count)


if __name__ == "__main__":
    main()
