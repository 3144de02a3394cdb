"""How cost grows with length on one GPU: one layer of each kind, and a whole model on a million tokens.

    python -m benchmarks.gpu_scaling [layers model scan] [--width 1024] [--longest 1048576]
    python -m benchmarks.gpu_scaling plot          # the newest layer rows as a picture, needs no GPU

Forward and backward of one layer in bfloat16, batch 1, random inputs, timed as CUDA graphs (the kernels and the gaps
between them); slopes are of log time against log length over the longest three doublings. The model is Mamba-130m in
bfloat16 with its blocks recomputed in the backward. `scan` is the setting of the Mamba paper's figure 8: batch 1, width
1,024, N = 16, the fused scan beside one in plain PyTorch.
"""

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import statespan
from benchmarks.gpu_models import GIB, PACKAGES
from benchmarks.gpu_ops import event_milliseconds, graph_milliseconds
from benchmarks.record import RESULTS, Row, report
from statespan.layers.attention import Attention
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.models.presets import preset
from statespan.ops import selective_scan
from statespan.training.recompute import recomputing

SHORTEST = 512
ATTENTION_LONGEST = 262_144  # four times that would take a hundred times as long as the others together
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "scaling_gpu.png"


def layers_of(width: int) -> dict[str, nn.Module]:
    """One mixer of each kind."""
    return {
        "Mamba-1": Mamba1(width, Mamba1Config()),
        "Mamba-2": Mamba2(width, Mamba2Config()),
        "attention": Attention(width, AttentionConfig(num_heads=width // 64)),
    }


def lengths(longest: int) -> list[int]:
    """Powers of two from SHORTEST on."""
    return [SHORTEST << i for i in range(int(math.log2(longest / SHORTEST)) + 1)]


def peak_gib(run: Callable[[], object]) -> float:
    """Peak memory of a run beyond what was there."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def slope(points: list[tuple[int, float]]) -> float:
    """Of log value against log length, between the last point and three doublings before it."""
    (short, low), (long, high) = points[max(0, len(points) - 4)], points[-1]
    return math.log(high / low) / math.log(long / short)


def crossover(points: list[tuple[int, float]], others: list[tuple[int, float]]) -> float | None:
    """The length from which on `points` are below `others`, by interpolation of logarithms."""
    gaps = [(length, math.log(mine / theirs)) for (length, mine), (_, theirs) in zip(points, others, strict=False)]
    for (short, above), (long, below) in pairwise(gaps):
        if above > 0 >= below:
            return short * (long / short) ** (above / (above - below))
    return None


def layer_points(name: str, layer: nn.Module, width: int, longest: int) -> Iterator[tuple[int, float, float, float]]:
    """Length, milliseconds of forward + backward with their spread, and GiB; until memory is full."""
    layer = layer.cuda().to(torch.bfloat16)
    for length in lengths(min(longest, ATTENTION_LONGEST) if name == "attention" else longest):
        hidden = torch.randn(1, length, width, device="cuda").to(torch.bfloat16).requires_grad_()
        wanted = [hidden, *layer.parameters()]

        def run(hidden: Tensor = hidden, wanted: list[Tensor] = wanted) -> None:
            torch.autograd.grad(layer(hidden)[0], wanted, hidden.detach())

        try:
            gib = peak_gib(run)
            torch.cuda.empty_cache()
            milliseconds, spread = graph_milliseconds(run, calls=1, repetitions=3)
        except torch.OutOfMemoryError:
            return
        yield length, milliseconds, spread, gib


def layer_rows(width: int, longest: int) -> Iterator[Row]:
    """Time and memory of forward + backward at each length, their slopes, and where attention is overtaken."""
    times: dict[str, list[tuple[int, float]]] = {}
    for name, layer in layers_of(width).items():
        memory: list[tuple[int, float]] = []
        times[name] = []
        for length, milliseconds, spread, gib in layer_points(name, layer, width, longest):
            times[name].append((length, milliseconds))
            memory.append((length, gib))
            yield Row(f"layer, width {width}, {length} tokens", name, milliseconds, "ms", spread)
            yield Row(f"layer, width {width}, {length} tokens", name, gib, "GiB", 0)
        yield Row(f"layer, width {width}, slope of time", name, slope(times[name]), "", 0)
        yield Row(f"layer, width {width}, slope of memory", name, slope(memory), "", 0)
    for name in ("Mamba-1", "Mamba-2"):
        at = crossover(times[name], times["attention"])
        if at is not None:
            yield Row(f"layer, width {width}, faster than attention from", name, at, "tokens", 0)


def model_rows(longest: int) -> Iterator[Row]:
    """Forward and backward of a whole model over one sequence of `longest` tokens."""
    config = preset("mamba-130m").replace(residual_float32=False)
    model = statespan.build(config, seed=0, device="cuda", dtype=torch.bfloat16, draw_on_device=True)
    ids = torch.randint(0, 50_000, (1, longest), device="cuda")

    def run() -> None:
        with recomputing(model.layers):
            loss = model(ids, labels=ids).loss
            assert loss is not None
            loss.backward()
        model.zero_grad(set_to_none=True)

    gib = peak_gib(run)
    milliseconds, spread = event_milliseconds(run, 2)
    task = f"mamba-130m, forward + backward of {longest:,} tokens"
    rate = f"{1e3 * longest / milliseconds:,.0f} tok/s"
    yield Row(task, "statespan bfloat16, blocks recomputed", milliseconds / 1e3, "s", spread, rate)
    yield Row(task, "statespan bfloat16, blocks recomputed", gib, "GiB", 0)


def plain_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The scan in unfused PyTorch: everything of size [t d n] in memory, log2(t) doubling steps."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    state = (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    step = 1
    while step < u.shape[0]:
        state = torch.cat([state[:step], state[step:] + decay[step:] * state[:-step]])
        decay = torch.cat([decay[:step], decay[step:] * decay[:-step]])
        step *= 2
    return (state * C.unsqueeze(1)).sum(-1)


def scan_rows(width: int, longest: int) -> Iterator[Row]:
    """The fused scan and the plain one, forward, as far as the plain one's memory goes."""
    A = -torch.rand(width, 16, device="cuda") - 0.5
    for length in lengths(min(longest, 65_536)):
        u, dt = (torch.randn(length, width, device="cuda") for _ in range(2))
        dt = dt.exp() * 0.01
        B, C = (torch.randn(length, 16, device="cuda") for _ in range(2))
        batch = (u[None], dt[None], A, B[None, :, None], C[None, :, None])
        fused, spread = graph_milliseconds(lambda batch=batch: selective_scan(*batch, dt_softplus=False), calls=4)
        task = f"scan, forward, width {width}, N 16, {length} tokens"
        yield Row(task, "statespan", fused, "ms", spread)
        plain, spread = event_milliseconds(lambda parts=(u, dt, A, B, C): plain_scan(*parts), 3)
        yield Row(task, "plain PyTorch", plain, "ms", spread, f"{plain / fused:.1f} times statespan's")


def plot(width: int) -> None:
    """The newest layer rows of results/gpu_scaling.csv as FIGURE."""
    import matplotlib.pyplot as plt

    found: dict[str, dict[str, dict[int, float]]] = {"ms": {}, "GiB": {}}
    with (RESULTS / "gpu_scaling.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            prefix = f"layer, width {width}, "
            if row["task"].startswith(prefix) and row["task"].endswith(" tokens"):
                length = int(row["task"].removeprefix(prefix).split()[0])
                found[row["unit"]].setdefault(row["system"], {})[length] = float(row["value"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (unit, systems) in zip(axes, found.items(), strict=True):
        for name, points in systems.items():
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_title(f"forward + backward of one layer, width {width}")
    axes[1].set_title("memory beyond weights and input")
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=120)
    print(FIGURE)


def main() -> None:
    """Measure what is asked for and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["layers", "model", "scan"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=1 << 20)
    options = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "layers": lambda: layer_rows(options.width, options.longest),
        "model": lambda: model_rows(options.longest),
        "scan": lambda: scan_rows(options.width, options.longest),
    }
    for part in options.parts:
        if part == "plot":
            plot(options.width)
        else:
            report("gpu_scaling", list(parts[part]()), PACKAGES)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
