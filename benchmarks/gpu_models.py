"""Whole models on one GPU: training steps with their peak memory, prefill, and calls for a first token.

    python -m benchmarks.gpu_models [train prefill first] [--only mamba-130m mamba-370m] [--memory] [--profile]

Random weights and tokens. Training is forward and backward under bfloat16 autocast with float32 parameters, as it comes
and as a CUDA graph (`run.cuda_graph=true`), the latter also with more memory (`run.recompute_convolutions=0`) and, with
--memory, with less (`run.recompute_projections`), and whole steps with the fused AdamW. The goals stand beside what
mamba-ssm 2.3.2 reached on an H100.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import statespan
from benchmarks.gpu_decode import built
from benchmarks.record import Row, report
from statespan.generation import generate
from statespan.generation.prefill import absorb
from statespan.models.prefill import Prefiller
from statespan.models.presets import preset
from statespan.training.captured import Captured
from statespan.training.recompute import recomputing

PACKAGES = ["statespan", "torch", "triton", "cuda-core"]
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """A model, the tokens it gets, and what mamba-ssm reached with them."""

    preset: str
    batch: int
    length: int
    peer: float  # tokens a second
    goal: float
    peer_gib: float = 0.0
    layers: int | None = None  # only the first of them

    @property
    def name(self) -> str:
        layers = f" of {self.layers} layers" if self.layers else ""
        return f"{self.preset}{layers}, {self.batch} x {self.length}"


TRAINING = (
    Case("mamba-130m", 16, 2048, 173_113, 300_000, 29.7),
    Case("mamba-370m", 8, 2048, 67_700, 120_000, 25.2),
    Case("mamba-1.4b", 4, 2048, 29_641, 45_000, 26.2),
    Case("mamba-370m", 1, 16384, 60_336, 115_000, 25.2),
    Case("mamba2-130m", 16, 2048, 189_692, 1.6 * 189_692),
    Case("mamba2-370m", 8, 2048, 54_709, 1.6 * 54_709),
    Case("mamba2-1.3b", 4, 2048, 21_090, 1.6 * 21_090),
)
PREFILL = (
    Case("mamba-1.4b", 1, 2048, 53_132, 110_000),
    Case("mamba-1.4b", 8, 2048, 128_035, 190_000),
    Case("mamba-2.8b", 1, 131_072, 64_099, 95_000),
    Case("jamba-v0.1", 1, 16384, 68_933, 1.3 * 68_933, layers=8),  # the peer is transformers
)


def seconds_of(run: Callable[[], object], repetitions: int) -> tuple[float, float]:
    """Median and spread of a run's time after two others."""
    times: list[float] = []
    for index in range(repetitions + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(time.perf_counter() - started)
    median = sorted(times)[len(times) // 2]
    return median, (max(times) - min(times)) / median


def profile(run: Callable[[], object]) -> None:
    """Print the kernels of one run by their time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in kernels)
    print(f"kernels {total / 1e3:.1f} ms")
    for row in kernels[:30]:
        print(f"{row.device_time_total / 1e3:9.2f} ms {row.count:6d} x  {row.key[:110]}")


@dataclass(frozen=True)
class Again:
    """Shares of the layers that compute something again in the backward."""

    projections: float = 0.0
    convolutions: float = 1.0
    casts: float = 1.0

    def __str__(self) -> str:
        if self == Again():
            return "forward + backward"
        shares = (f"recompute_{name}={share:g}" for name, share in vars(self).items() if share != getattr(Again, name))
        return ", ".join(("forward + backward", *shares))


def training_rows(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """Tokens a second and peak memory: forward + backward, the same as a CUDA graph, and whole steps of AdamW.

    The peak is that of forward + backward as they come, with new gradients.
    """
    repetitions, again = options.repetitions, Again()
    model = statespan.build(case.preset, seed=0, device="cuda", draw_on_device=True)
    ids = torch.randint(0, 50_000, (case.batch, case.length), device="cuda")
    task = f"{case.name}, training"
    goal = f"goal {case.goal:,.0f}, mamba-ssm {case.peer:,.0f}"
    peer = f"mamba-ssm {case.peer_gib or 'unknown'}"

    def forward_backward(ids: Tensor) -> Tensor:
        with (
            torch.autocast("cuda", torch.bfloat16),
            recomputing(model.layers, False, again.projections, again.convolutions, again.casts),
        ):
            loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        return loss.detach()

    def bare() -> None:
        forward_backward(ids)
        model.zero_grad()

    def peak_after(run: Callable[[], object]) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / GIB

    def as_graph() -> tuple[float, float, Callable[[], object]]:
        captured = Captured(model, forward_backward)

        def replay() -> None:
            captured(ids)
            model.zero_grad()  # while the GPU computes, as where a step follows

        return *seconds_of(replay, repetitions), lambda: captured(ids)

    seconds, spread = seconds_of(bare, repetitions)
    yield Row(task, str(again), ids.numel() / seconds, "tok/s", spread, goal)
    yield Row(task, str(again), peak_after(bare), "GiB", 0, peer)
    if options.profile:
        profile(bare)
    for again in (
        Again(convolutions=0),
        Again(convolutions=0, casts=0),
        *((Again(0.25), Again(1)) if options.memory else ()),
    ):
        yield Row(task, str(again), peak_after(bare), "GiB", 0, peer)
        seconds, spread = as_graph()[:2]  # the graph and its memory go
        yield Row(task, f"{again}, CUDA graph", ids.numel() / seconds, "tok/s", spread, goal)
        model.zero_grad()
    again = Again()
    seconds, spread, captured = as_graph()
    yield Row(task, f"{again}, CUDA graph", ids.numel() / seconds, "tok/s", spread, goal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        captured()
        optimizer.step()
        model.zero_grad()

    seconds, spread = seconds_of(step, repetitions)
    yield Row(task, "AdamW step, CUDA graph", ids.numel() / seconds, "tok/s", spread, goal)
    reserved = torch.cuda.memory_reserved() / GIB  # a graph's memory is not counted as allocated
    yield Row(task, "AdamW step, CUDA graph", reserved, "GiB reserved", 0)


def prefill_rows(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """Tokens a second of one prompt a row: the last token's logits and the state.

    As the model's forward comes, as `generate` does it where it has graphs, and as a graph alone.
    """
    repetitions = options.repetitions
    config = preset(case.preset)
    model = built(config.replace(layers=config.layers[: case.layers]))
    ids = torch.randint(0, 50_000, (case.batch, case.length), device="cuda")

    @torch.inference_mode()
    def run() -> None:
        model(ids, state=model.new_state(case.batch), logits_at="last")

    torch.cuda.reset_peak_memory_stats()
    seconds, spread = seconds_of(run, repetitions)
    goal = f"goal {case.goal:,.0f}, {'transformers' if case.layers else 'mamba-ssm'} {case.peer:,.0f}"
    yield Row(f"{case.name}, prefill", "statespan bfloat16", ids.numel() / seconds, "tok/s", spread, goal)
    peak = torch.cuda.max_memory_allocated() / GIB
    yield Row(f"{case.name}, prefill", "statespan bfloat16", peak, "GiB", 0)
    if options.profile:
        profile(run)
    if Prefiller.serves(case.batch, case.length):
        prompts: list[list[int]] = ids.tolist()
        seconds, spread = seconds_of(lambda: absorb(model, prompts, model.new_state(case.batch), None), repetitions)
        system = "statespan bfloat16, in generate"
        yield Row(f"{case.name}, prefill", system, ids.numel() / seconds, "tok/s", spread, goal)
    if seconds > 1:  # the host's part is nothing
        return
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        run()
    seconds, spread = seconds_of(graph.replay, repetitions)
    system = "statespan bfloat16, CUDA graph"
    yield Row(f"{case.name}, prefill", system, ids.numel() / seconds, "tok/s", spread, goal)


def first_rows(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds of a call of `generate` for one token, after a prompt of a length that came before."""
    model = built(preset(case.preset))
    for length in (128, 512, 700, 2048):
        prompt: list[int] = torch.randint(0, 50_000, (length,)).tolist()
        run = partial(generate, model, prompt, max_new_tokens=1, temperature=0)
        seconds, spread = seconds_of(run, options.repetitions)
        yield Row(f"{case.preset}, first token after {length}", "statespan bfloat16", 1e3 * seconds, "ms", spread)


def main() -> None:
    """Measure what is asked for and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["train", "prefill", "first"])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name holds one of these")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="training that keeps less for the backward, too")
    parser.add_argument("--profile", action="store_true", help="print each case's kernels by time")
    options = parser.parse_args()
    first = tuple(Case(name, 1, 2048, 0, 0) for name in ("mamba-130m", "mamba-1.4b"))
    parts = {"train": (TRAINING, training_rows), "prefill": (PREFILL, prefill_rows), "first": (first, first_rows)}
    for part in options.parts:
        cases, rows_of = parts[part]
        for case in cases:
            if any(part in case.name for part in options.only):
                report(f"gpu_{part}", list(rows_of(case, options)), PACKAGES)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
