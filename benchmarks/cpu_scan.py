"""The Mamba-1 scan alone on the CPU, beside mambapy's parallel scan, Hugging Face's loop, and C++ with intrinsics.

    python -m benchmarks.cpu_scan [--length 2048] [--channels 1536] [--states 16]

mambapy is compared when it can be imported, C++ where there is g++ and AVX-512.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpp_scan import CppScan, available
from benchmarks.record import Row, report
from benchmarks.timing import time_in_turns
from statespan.ops import selective_scan

Inputs = dict[str, Tensor]


def random_inputs(length: int, channels: int, states: int, dtype: torch.dtype) -> Inputs:
    """Inputs as a fresh Mamba layer sees them."""
    torch.manual_seed(0)
    named = {
        "u": torch.randn(1, length, channels, dtype=dtype),
        "dt": torch.randn(1, length, channels, dtype=dtype),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(1, length, 1, states, dtype=dtype),
        "C": torch.randn(1, length, 1, states, dtype=dtype),
        "D": torch.ones(channels),
        "z": torch.randn(1, length, channels, dtype=dtype),
        "dt_bias": torch.rand(channels) * 4 - 6,
    }
    return {name: tensor.requires_grad_() for name, tensor in named.items()}


def ours(x: Inputs) -> Tensor:
    """The fused op."""
    return selective_scan(x["u"], x["dt"], x["A"], x["B"], x["C"], x["D"], x["z"], dt_bias=x["dt_bias"])


def _finish(x: Inputs, y: Tensor) -> Tensor:
    return (y + x["D"] * x["u"]) * F.silu(x["z"])


def mambapy(x: Inputs) -> Tensor:
    """mambapy's parallel scan with the same inputs and outputs."""
    from mambapy.pscan import pscan  # type: ignore[import-not-found]  # a peer, present only where it is compared

    dt = F.softplus(x["dt"] + x["dt_bias"])
    decay = torch.exp(dt.unsqueeze(-1) * x["A"])
    states = pscan(decay, (dt * x["u"]).unsqueeze(-1) * x["B"])
    return _finish(x, (states @ x["C"].squeeze(2).unsqueeze(-1)).squeeze(-1))


def loop(x: Inputs) -> Tensor:
    """The sequential form of transformers and of mamba_ssm's reference."""
    dt = F.softplus(x["dt"] + x["dt_bias"])
    decay = torch.exp(dt.unsqueeze(-1) * x["A"])
    inputs = (dt * x["u"]).unsqueeze(-1) * x["B"]
    state, outputs = torch.zeros_like(decay[:, 0]), []
    for t in range(dt.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        outputs.append((state @ x["C"][:, t, 0].unsqueeze(-1)).squeeze(-1))
    return _finish(x, torch.stack(outputs, dim=1))


def check(cpp: CppScan, x: Inputs, plain: Inputs, grad_y: Tensor) -> None:
    """C++ computes what we do, gradients included."""
    y = ours(x)
    torch.testing.assert_close(cpp.forward(plain)[0], y, rtol=1e-4, atol=1e-4)
    found = cpp.forward_backward(plain, grad_y)
    for (name, _), gradient in zip(x.items(), torch.autograd.grad(y, list(x.values()), grad_y), strict=True):
        limit = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=limit, msg=lambda text, n=name: f"{n}: {text}"
        )


def measure(length: int, channels: int, states: int) -> list[Row]:
    """Rows for forward, and for forward with backward."""
    x = random_inputs(length, channels, states, torch.float32)
    half = random_inputs(length, channels, states, torch.bfloat16)
    systems: dict[str, Callable[[], Tensor]] = {
        "statespan float32": lambda: ours(x),
        "statespan bfloat16": lambda: ours(half),
    }
    if find_spec("mambapy") is not None:
        systems["mambapy"] = lambda: mambapy(x)
        torch.testing.assert_close(ours(x), mambapy(x), rtol=1e-3, atol=1e-3)
    task, rows = f"1 x {length} x {channels}, N = {states}", list[Row]()
    grad_y = torch.randn_like(x["u"])

    def forward(run: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                run()

        return call

    def forward_backward(run: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            y = run()
            leaves = list((x if y.dtype == torch.float32 else half).values())
            torch.autograd.grad(y, leaves, grad_y.to(y.dtype))

        return call

    forwards = {name: forward(run) for name, run in systems.items()} | {"loop": forward(lambda: loop(x))}
    both = {name: forward_backward(run) for name, run in systems.items()}
    if available(channels, states):
        cpp, plain = CppScan(), {name: tensor.detach() for name, tensor in x.items()}
        check(cpp, x, plain, grad_y)
        forwards["C++ AVX-512 float32"] = lambda: cpp.forward(plain)
        both["C++ AVX-512 float32"] = lambda: cpp.forward_backward(plain, grad_y)
    for name, timing in time_in_turns(forwards, repetitions=15).items():
        rows.append(Row(f"scan forward, {task}", name, timing.median_s * 1e3, "ms", timing.spread))
    for name, timing in time_in_turns(both, repetitions=15).items():
        rows.append(Row(f"scan forward + backward, {task}", name, timing.median_s * 1e3, "ms", timing.spread))
    return rows


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--states", type=int, default=16)
    options = parser.parse_args()
    rows = measure(options.length, options.channels, options.states)
    report("cpu_scan", rows, ["statespan", "torch", "numba", "mambapy"])


if __name__ == "__main__":
    main()
