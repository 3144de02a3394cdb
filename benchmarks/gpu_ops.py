"""The memory-bound ops on a GPU: bytes that must move over the time taken, beside a copy's in the same run.

    python -m benchmarks.gpu_ops [--only rms_norm]

Times are those of CUDA graphs: the kernels and the gaps between them, without Python. Each op is checked by its tests,
`pytest tests/ops`, not here.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.record import Row, report
from statespan.ops import (
    causal_conv1d,
    causal_conv1d_update,
    gated_rms_norm,
    linear_cross_entropy,
    rms_norm,
    sampling_edge,
    selective_state_update,
    ssd_state_update,
)

BF16 = torch.bfloat16
GOAL = 0.85  # of copy bandwidth


@dataclass(frozen=True)
class Case:
    """A call and the bytes that it has to read and write at the least."""

    name: str
    run: Callable[[], object]
    bytes_moved: int


def captured(run: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of so many calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
    return graph


def graph_milliseconds(run: Callable[[], object], calls: int = 20, repetitions: int = 7) -> tuple[float, float]:
    """Median and spread of one call's time, as replays of a graph of `calls` of them."""
    return event_milliseconds(captured(run, calls).replay, repetitions, calls)


def event_milliseconds(run: Callable[[], object], repetitions: int = 7, calls: int = 1) -> tuple[float, float]:
    """Median and spread by CUDA events, `calls` a run."""
    run()
    times: list[float] = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        run()
        stop.record(torch.cuda.current_stream())
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    median = sorted(times)[len(times) // 2]
    return median, (max(times) - min(times)) / median


def copy_bandwidth() -> float:
    """Bytes read and written a millisecond by a copy of 512 MiB."""
    source = torch.randn(1 << 28, device="cuda").to(BF16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / event_milliseconds(lambda: target.copy_(source), 15)[0]


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Random values on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def norms() -> Iterator[Case]:
    """rms_norm with a residual in float32, and gated_rms_norm."""
    ops = torch.ops.statespan
    for rows, channels in ((65536, 768), (32768, 1536), (16384, 2560), (16384, 5120)):
        x, z = normal(rows, channels), normal(rows, channels)
        residual, weight = normal(rows, channels, dtype=torch.float32), normal(channels, dtype=torch.float32)
        shape, size = f"{rows} x {channels}", rows * channels
        with torch.autocast("cuda", BF16):
            forward = partial(rms_norm, x, weight, eps=1e-5, residual=residual)
            yield Case(f"rms_norm + residual forward, {shape}", autocast(forward), 12 * size)
        total = normal(rows, channels, dtype=torch.float32)
        backward = partial(ops.rms_norm_backward, x, total, residual, weight, 1e-5, "auto")
        yield Case(f"rms_norm + residual backward, {shape}", backward, 14 * size)
        gated = partial(gated_rms_norm, x, z, weight, eps=1e-5)
        yield Case(f"gated_rms_norm forward, {shape}", gated, 6 * size)
        grad = normal(rows, channels)
        backward = partial(ops.gated_rms_norm_backward, grad, x, z, weight, 1e-5, channels, False, "auto")
        yield Case(f"gated_rms_norm backward, {shape}", backward, 10 * size)


def autocast(run: Callable[[], object]) -> Callable[[], object]:
    """`run` under autocast in bfloat16."""

    def call() -> object:
        with torch.autocast("cuda", BF16):
            return run()

    return call


def convolutions() -> Iterator[Case]:
    """causal_conv1d on one half of a projection, as in the mixer; with and without packed documents."""
    for batch, length, channels in ((16, 2048, 1536), (4, 4096, 4096), (1, 16384, 1792)):
        x = normal(batch, length, 2 * channels)[..., :channels]
        weight, bias = normal(channels, 4, dtype=torch.float32), normal(channels, dtype=torch.float32)
        grad, state = normal(batch, length, channels), normal(batch, 3, channels)
        packed = (torch.arange(length, device="cuda") // 500).expand(batch, length).contiguous()
        size = batch * length * channels
        for segments, kind in ((None, ""), (packed, ", documents of 500")):
            shape = f"{batch} x {length} x {channels}{kind}"
            forward = partial(causal_conv1d, x, weight, bias, segments=segments)
            yield Case(f"causal_conv1d forward, {shape}", forward, 4 * size)
            arguments = (grad, state, x, weight, bias, None, segments, True, "auto")
            backward = partial(torch.ops.statespan.causal_conv1d_backward, *arguments)
            yield Case(f"causal_conv1d backward, {shape}", backward, 6 * size)


def updates() -> Iterator[Case]:
    """One token of the mixers of a 2.8b Mamba-1 and a 2.7b Mamba-2."""
    channels, states, heads = 5120, 16, 80
    for batch in (1, 8, 64, 128):
        x, weight = normal(batch, channels), normal(channels, 4)
        conv = partial(causal_conv1d_update, normal(batch, 3, channels), x, weight)
        yield Case(f"causal_conv1d_update, batch {batch}", conv, 16 * batch * channels)
        A, B = -normal(channels, states, dtype=torch.float32).abs(), normal(batch, 1, states)
        D = normal(channels, dtype=torch.float32)
        state = normal(batch, channels, states, dtype=torch.float32)
        call = partial(selective_state_update, state, x, x, A, B, B, D, x, dt_bias=D)
        yield Case(f"selective_state_update, batch {batch}", call, 2 * state.nbytes + 8 * x.numel() + A.nbytes)
        state = normal(batch, heads, 64, 128, dtype=torch.float32)
        A, B = -normal(heads, dtype=torch.float32).abs(), normal(batch, 1, 128)
        x = x.view(batch, heads, 64)
        call = partial(ssd_state_update, state, x, normal(batch, heads), A, B, B, A, dt_bias=A)
        yield Case(f"ssd_state_update, batch {batch}", call, 2 * state.nbytes + 4 * x.numel())


CASES = {"rms_norm": norms, "causal_conv1d": convolutions, "updates": updates}


def bandwidth_rows(only: str | None) -> Iterator[Row]:
    """Each case's share of copy bandwidth."""
    copy = copy_bandwidth()
    yield Row("copy of 512 MiB", "torch", copy / 1e6, "GB/s", 0.0)
    for group, cases in CASES.items():
        if only not in (None, group):
            continue
        for case in cases():
            with torch.no_grad():
                milliseconds, spread = graph_milliseconds(case.run)
            rate = case.bytes_moved / milliseconds
            note = f"{milliseconds * 1e3:.1f} us, {rate / copy:.0%} of copy; goal {GOAL:.0%}"
            yield Row(case.name, "statespan", rate / 1e6, "GB/s", spread, note)


def peak_mebibytes(run: Callable[[], object]) -> float:
    """The most that a second call holds beside what was there before."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def gradients_of(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))


def cross_entropy_rows() -> Iterator[Row]:
    """Forward and backward of the head and its loss: 16,384 tokens, 50,280 rows."""
    tokens, vocabulary = 16384, 50280
    for hidden_size in (768, 2048):
        hidden = normal(tokens, hidden_size).requires_grad_()
        weight = (normal(vocabulary, hidden_size) * 0.05).requires_grad_()
        labels = torch.randint(0, vocabulary, (tokens,), device="cuda")

        def plain(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w), labels)

        systems: dict[str, Callable[..., Tensor]] = {
            "statespan": linear_cross_entropy,
            "statespan torch": partial(linear_cross_entropy, backend="torch"),
            "logits + F.cross_entropy": plain,
        }
        for name, loss in systems.items():
            run = partial(gradients_of, loss, hidden, weight, labels)
            task = f"linear_cross_entropy forward + backward, {tokens} x {hidden_size} x {vocabulary}"
            milliseconds, spread = event_milliseconds(run)
            yield Row(task, name, milliseconds, "ms", spread, f"peak {peak_mebibytes(run):,.0f} MiB")


def sampling_rows() -> Iterator[Row]:
    """Where top_p cuts off, by a search and by a sort of the vocabulary."""
    for rows, vocabulary in ((1, 50280), (8, 65536), (64, 50280), (64, 131072)):
        logits = 2 * torch.randn(rows, vocabulary, device="cuda")
        weights, top_p = (logits - logits.amax(1, keepdim=True)).exp(), torch.full((rows,), 0.9, device="cuda")
        for name, backend in (("statespan", "auto"), ("statespan torch", "torch")):
            run = partial(sampling_edge, weights, top_p=top_p, backend=backend)
            milliseconds, spread = graph_milliseconds(run)
            yield Row(f"sampling_edge, {rows} x {vocabulary}", name, milliseconds * 1e3, "us", spread)


OTHERS = {"linear_cross_entropy": cross_entropy_rows, "sampling_edge": sampling_rows}


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*CASES, *OTHERS])
    options = parser.parse_args()
    rows = list(bandwidth_rows(options.only)) if options.only not in OTHERS else []
    for name, others in OTHERS.items():
        if options.only in (None, name):
            rows += others()
    report("gpu_ops", rows, ["statespan", "torch", "triton"])


if __name__ == "__main__":
    main()
