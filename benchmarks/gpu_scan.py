"""The Mamba-1 scan on a GPU, forward and backward, next to the goals for an H100.

    python -m benchmarks.gpu_scan

Every shape is checked against the recurrence in float64 on a few channels before it is timed.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.record import Row, report
from statespan.ops import selective_scan

# (batch, channels, length): the goal, and what mamba_ssm 2.3.2 reached, in milliseconds on one H100; forward, backward.
SHAPES = {
    (8, 5120, 2048): ((0.58, 1.457), (2.0, 5.999)),
    (1, 5120, 2048): ((0.080, 0.200), (0.29, 0.879)),
    (8, 1536, 2048): ((0.18, 0.450), (0.61, 1.835)),
    (1, 1536, 16384): ((0.23, 0.579), (0.68, 2.039)),
    (2, 8192, 8192): ((1.17, 2.916), (3.2, 9.710)),
    (1, 8192, 32768): ((2.47, 6.166), (6.6, 19.85)),
}
# (batch, channels, length) of the layers of a model in training.
TRAINING = {(16, 1536, 2048): "130m", (8, 2048, 2048): "370m", (4, 4096, 2048): "1.4b", (1, 2048, 16384): "370m"}
STATES = (8, 32, 64, 128)  # at 8, 1024, 2048, next to 16

Inputs = dict[str, Any]  # tensors, passed by keyword


def random_inputs(batch: int, channels: int, length: int, states: int) -> Inputs:
    """Inputs as a layer sees them: bfloat16, with z half of a projection, A, D and dt_bias in float32."""
    torch.manual_seed(0)
    on: Any = {"device": "cuda", "dtype": torch.bfloat16}
    matrices = torch.randn(batch, length, 2, states, **on)
    named = {
        "u": torch.randn(batch, length, channels, **on),
        "dt": torch.randn(batch, length, channels, **on),
        "A": -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1),
        "B": matrices[:, :, :1],
        "C": matrices[:, :, 1:],
        "D": torch.ones(channels, device="cuda"),
        "z": torch.randn(batch, length, 2 * channels, **on)[..., channels:],
        "dt_bias": torch.rand(channels, device="cuda") * 4 - 6,
    }
    return {name: value.detach().requires_grad_() for name, value in named.items()}


def check(x: Inputs) -> float:
    """The largest error of a few channels and the first tokens against float64, as a part of the largest value."""
    part = {n: v[:1, :200, :8] if n in ("u", "dt", "z") else v[:8] for n, v in x.items() if n not in ("B", "C")}
    part |= {n: x[n][:1, :200] for n in ("B", "C")}
    exact = selective_scan(**{n: v.detach().double() for n, v in part.items()})
    found = selective_scan(**{n: v.detach() for n, v in x.items()})[:1, :200, :8]
    error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
    assert error < 2**-7, f"the scan is wrong by {error:.1e}"
    return error


def time_both(x: Inputs) -> tuple[float, float]:
    """Milliseconds of the forward that keeps what the backward wants, and of the backward."""
    y = selective_scan(**x)
    upstream = torch.randn_like(y)
    leaves = list(x.values())

    def forward() -> None:
        selective_scan(**x)

    def backward() -> None:
        torch.autograd.grad(y, leaves, upstream, retain_graph=True)

    return _median_ms(forward), _median_ms(backward)


def _median_ms(run: Callable[[], None], times: int = 40) -> float:
    """What the GPU takes, from an empty L2 cache; emptying it takes longer than the host takes to launch `run`."""
    cache = torch.empty(2**31, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for begin, end in events:
        cache.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in events[times // 4 :])


def main() -> None:
    """Measure and record."""
    rows: list[Row] = []
    system = f"statespan bfloat16, {torch.cuda.get_device_name()}"
    for (batch, channels, length), goals in SHAPES.items():
        x = random_inputs(batch, channels, length, 16)
        error = check(x)
        for name, (goal, peer), value in zip(("forward", "backward"), goals, time_both(x), strict=True):
            task = f"scan {name}, {batch} x {length} x {channels}, N = 16"
            note = f"goal {goal} ms, mamba_ssm {peer}; error {error:.0e}"
            rows.append(Row(task, system, value, "ms", 0.0, note))
    for (batch, channels, length), model in TRAINING.items():
        x = random_inputs(batch, channels, length, 16)
        error = check(x)
        for name, value in zip(("forward", "backward"), time_both(x), strict=True):
            task = f"scan {name}, {batch} x {length} x {channels}, N = 16"
            rows.append(Row(task, system, value, "ms", 0.0, f"a layer of {model} in training; error {error:.0e}"))
    base = time_both(random_inputs(8, 1024, 2048, 16))
    for states in STATES:
        x = random_inputs(8, 1024, 2048, states)
        error = check(x)
        for name, value, unit in zip(("forward", "backward"), time_both(x), base, strict=True):
            note = f"{value / unit * 16 / states:.2f} x the cost of a state at N = 16; error {error:.0e}"
            rows.append(Row(f"scan {name}, 8 x 2048 x 1024, N = {states}", system, value, "ms", 0.0, note))
    report("gpu_scan", rows, ["statespan", "torch", "cuda-core", "nvidia-cuda-nvrtc"])


if __name__ == "__main__":
    main()
