"""Mamba-2's SSD on a GPU, forward and backward, next to its floor, the PyTorch form and the Mamba-1 scan.

    python -m benchmarks.gpu_ssd

Times are those of CUDA graphs: the kernels and the gaps between them, without Python. Every shape is checked against
the recurrence in float64 on a few heads before it is timed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_ops import copy_bandwidth, event_milliseconds, graph_milliseconds, normal
from benchmarks.record import Row, report
from statespan.ops import selective_scan, ssd

# (batch, length, heads of 64, states): Mamba-2 130m, 370m and 1.3b in training, long rows, 64 states.
SHAPES = (
    (16, 2048, 24, 128),
    (8, 2048, 32, 128),
    (4, 2048, 64, 128),
    (1, 16384, 32, 128),
    (1, 65536, 64, 128),
    (8, 2048, 32, 64),
)
HEAD_DIM = 64
CHUNK = 64  # of the forward; what the count of its operations goes by
GOALS = {(16, 2048, 24, 128): (0.35, 0.9)}  # milliseconds, forward and backward

Inputs = dict[str, Any]  # tensors, passed by keyword


def random_inputs(batch: int, length: int, heads: int, states: int) -> Inputs:
    """Inputs as a layer sees them: bfloat16 parts of one projection; A, D and dt_bias in float32."""
    torch.manual_seed(0)
    inner = heads * HEAD_DIM
    x, B, C = normal(batch, length, inner + 2 * states).split([inner, states, states], dim=-1)
    ones = torch.ones(heads, device="cuda")
    return {
        "x": x.unflatten(-1, (heads, HEAD_DIM)),
        "dt": normal(batch, length, inner + heads)[..., inner:],
        "A": -torch.rand(heads, device="cuda") * 15 - 1,
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": ones,
        "dt_bias": torch.rand(heads, device="cuda") * 4 - 6,
    }


def check(inputs: Inputs) -> float:
    """The error of two heads and the first tokens against float64, as a part of the norm."""
    cut = {name: value[:1, :200] if value.dim() > 1 else value for name, value in inputs.items()}
    few = {
        name: value if name in "BC" else value[..., :2] if name != "x" else value[:, :, :2]
        for name, value in cut.items()
    }
    exact = ssd(**{name: value.double() for name, value in few.items()}, backend="reference")
    error = ((ssd(**inputs)[:1, :200, :2].double() - exact).norm() / exact.norm()).item()
    assert error < 2**-7, f"the op is wrong by {error:.1e}"
    return error


def calls(inputs: Inputs, backend: str = "auto") -> dict[str, Callable[[], object]]:
    """The op's forward and backward."""
    x = inputs["x"]
    batch, _, heads, head_dim = x.shape
    final = torch.zeros(batch, heads, head_dim, inputs["B"].shape[3], device="cuda")
    tensors = (*(inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")), None, None)
    arguments = (torch.randn_like(x), final, *tensors, True, 0.0, float("inf"), 256, "mamba", backend)
    backward = partial(torch.ops.statespan.ssd_backward, *arguments)
    return {"forward": partial(ssd, **inputs, backend=backend), "backward": backward}


def floors(inputs: Inputs) -> dict[str, tuple[int, int]]:
    """The bytes that inputs and outputs are, and the operations of the chunked form."""
    tokens, heads = inputs["x"].shape[0] * inputs["x"].shape[1], inputs["x"].shape[2]
    states = inputs["B"].shape[3]
    wide, narrow = 2 * tokens * heads * HEAD_DIM, 2 * tokens * (2 * states + heads)
    operations = 2 * tokens * heads * (CHUNK * (states + HEAD_DIM) + 2 * HEAD_DIM * states)
    return {"forward": (2 * wide + narrow, operations), "backward": (3 * wide + 2 * narrow, 5 * operations // 2)}


def rows() -> Iterator[Row]:
    """Every shape, then the peers."""
    copy = copy_bandwidth()
    yield Row("copy of 512 MiB", "torch", copy / 1e6, "GB/s", 0.0)
    for shape in SHAPES:
        batch, length, heads, states = shape
        inputs = random_inputs(*shape)
        error, floor = check(inputs), floors(inputs)
        for place, (name, run) in enumerate(calls(inputs).items()):
            milliseconds, spread = graph_milliseconds(run, calls=4)
            moved, operations = floor[name]
            note = (
                f"{operations / milliseconds / 1e9:.0f} TFLOP/s; {moved / copy / milliseconds:.0%} of its bytes' floor"
            )
            if shape in GOALS:
                note += f"; goal {GOALS[shape][place]} ms"
            task = f"ssd {name}, {batch} x {length} x {heads} heads of {HEAD_DIM}, N = {states}"
            yield Row(task, "statespan", milliseconds, "ms", spread, f"{note}; error {error:.0e}")
    yield from peers()


def peers() -> Iterator[Row]:
    """The same op in PyTorch, and the Mamba-1 scan at as many channels and states."""
    for name, run in calls(random_inputs(*SHAPES[0]), "torch").items():
        yield timed(f"ssd {name}, 16 x 2048 x 24 heads of 64, N = 128", "statespan torch", run)
    batch, length, heads, _ = SHAPES[-1]
    channels = heads * HEAD_DIM
    for states in (16, 64):
        u, matrices = normal(batch, length, channels), normal(batch, length, 2, states)
        options: Any = {"dt_bias": torch.rand(channels, device="cuda") * 4 - 6}
        A = -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1)
        arguments = (u, u.clone(), A, matrices[:, :, :1], matrices[:, :, 1:])
        task = f"selective_scan {{}}, {batch} x {length} x {channels}, N = {states}"
        yield timed(task.format("forward"), "statespan", partial(selective_scan, *arguments, **options))
        with torch.enable_grad():
            leaves = [value.requires_grad_() for value in arguments]
            y = selective_scan(*leaves, **options)
        backward = partial(torch.autograd.grad, y, leaves, torch.randn_like(y), retain_graph=True)
        yield timed(task.format("backward"), "statespan", backward)


def timed(task: str, system: str, run: Callable[[], object]) -> Row:
    """A peer, by events."""
    milliseconds, spread = event_milliseconds(run)
    return Row(task, system, milliseconds, "ms", spread)


def main() -> None:
    """Measure and record."""
    with torch.no_grad():
        found = list(rows())
    report("gpu_ssd", found, ["statespan", "torch", "triton"])


if __name__ == "__main__":
    main()
