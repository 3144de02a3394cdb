"""Experts' MLPs and the attention of one token on a GPU, beside what they cannot beat in the same run.

    python -m benchmarks.gpu_experts [--only few]

Few tokens are bound by the weights: time over that of reading the experts that they chose once, at a copy's bandwidth;
small experts by their three launches. Many are bound by the matrix units: their rate over that of dense products of the
same size. Times are those of CUDA graphs, without Python; the values are checked by `pytest tests/ops`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ops import BF16, captured, copy_bandwidth, event_milliseconds, graph_milliseconds, normal
from benchmarks.record import Row, report
from statespan.ops import decode_attention, grouped_mlp
from statespan.ops.activation import GATED

FEW = (1, 2, 8, 16, 64, 512)
MANY = 8192
ROUNDS = 9


@dataclass(frozen=True)
class Shape:
    """One layer's experts."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "swiglu"

    @property
    def up_size(self) -> int:
        return self.inner * (2 if self.activation in GATED else 1)

    @property
    def values(self) -> int:
        """Weights of one expert."""
        return self.hidden * (self.up_size + self.inner)


SHAPES = (
    Shape("Jamba v0.1", 4096, 14336, 16, 2),
    Shape("Mixtral 8x7B", 4096, 14336, 8, 2),
    Shape("MoE-Mamba", 768, 3072, 32, 1, "silu"),
    Shape("64 experts", 1024, 2048, 64, 2),
)


def weights(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Random parameters, in bfloat16 or int8 with scales."""
    up, down = (shape.experts, shape.up_size, shape.hidden), (shape.experts, shape.hidden, shape.inner)
    if dtype == torch.int8:
        return {
            "up_proj": torch.randint(-127, 128, up, dtype=torch.int8, device="cuda"),
            "down_proj": torch.randint(-127, 128, down, dtype=torch.int8, device="cuda"),
            "up_scale": torch.rand(up[:2], device="cuda") / (64 * shape.hidden**0.5),
            "down_scale": torch.rand(down[:2], device="cuda") / (64 * shape.inner**0.5),
        }
    found = {
        "up_proj": torch.empty(up, dtype=dtype, device="cuda"),
        "down_proj": torch.empty(down, dtype=dtype, device="cuda"),
    }
    for matrices in found.values():
        for matrix in matrices:
            matrix.copy_(normal(*matrix.shape) / matrix.shape[1] ** 0.5)
    return found


def routed(shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, and distinct experts chosen evenly."""
    scores, index = torch.rand(tokens, shape.experts, device="cuda").topk(shape.top_k, dim=1)
    return normal(tokens, shape.hidden), index, scores


def each_routing(inputs: list[tuple[Tensor, Tensor, Tensor]], parameters: dict[str, Any], activation: str) -> None:
    """One call for each of the inputs."""
    for x, index, weight in inputs:
        grouped_mlp(x, index, weight, **parameters, activation=activation)


def launches(value: Tensor, count: int) -> None:
    """Kernels that do nothing but wait for one another."""
    for _ in range(count):
        value.add_(1)


def launch_row() -> Row:
    """What the three launches of a few tokens' MLP take without any work."""
    milliseconds, spread = graph_milliseconds(partial(launches, torch.zeros(1, device="cuda"), 3))
    return Row("three launches that do nothing", "torch", milliseconds * 1e3, "us", spread)


def few_rows(shape: Shape, copy: float) -> Iterator[Row]:
    """A graph runs several routings in turn, so that no expert's weights are still in the cache."""
    parameters = {"bf16": weights(shape, BF16), "int8": weights(shape, torch.int8)}
    for tokens in FEW:
        inputs = [routed(shape, tokens) for _ in range(12 if shape.hidden < 4096 else 4)]
        touched = sum(len(index.unique()) for _, index, _ in inputs) / len(inputs)
        times: dict[str, float] = {}
        for kind, given in parameters.items():
            floor = touched * shape.values * given["up_proj"].element_size() / copy
            milliseconds, spread = graph_milliseconds(partial(each_routing, inputs, given, shape.activation), calls=1)
            times[kind] = milliseconds / len(inputs)
            note = f"{times[kind] / floor:.2f} x reading {touched:.1f} experts; goal 1.3"
            if kind == "int8":
                note += f"; {times['bf16'] / times['int8']:.2f} x as fast as bf16; goal 2"
            yield Row(f"{shape.name}, {kind}, {tokens} tokens", "statespan", times[kind] * 1e3, "us", spread, note)


def many_rows(shape: Shape, copy: float) -> Iterator[Row]:
    """Forward, and backward with all gradients, beside dense products of as many operations.

    A dense product reads one matrix, experts all of theirs: `torch.bmm` of as many rows for each says what that costs
    a library. The bytes: weights and their gradients, rows in and out, and inner rows, written once and read once.
    """
    parameters, (x, index, weight) = weights(shape, BF16), routed(shape, MANY)
    rows = index.numel()
    operations = 2 * rows * shape.values
    up, down = parameters["up_proj"][0], parameters["down_proj"][0]
    a, b = normal(rows, shape.hidden), normal(rows, shape.inner)

    def dense() -> None:
        torch.mm(a, up.T)
        torch.mm(b, down.T)

    def even() -> None:
        torch.bmm(a.unflatten(0, (shape.experts, -1)), parameters["up_proj"].mT)
        torch.bmm(b.unflatten(0, (shape.experts, -1)), parameters["down_proj"].mT)

    arguments = (x, index, weight, parameters["up_proj"], parameters["down_proj"], None, None, shape.activation)
    _, kept = torch.ops.statespan.grouped_mlp(*arguments, True, "auto")
    backward = partial(torch.ops.statespan.grouped_mlp_backward, x, kept, *arguments, "auto")
    forward = partial(grouped_mlp, x, index, weight, **parameters, activation=shape.activation)
    weight_bytes = sum(value.nbytes for value in parameters.values())
    forward_bytes = weight_bytes + 2 * x.nbytes + 2 * b.nbytes
    backward_bytes = 2 * weight_bytes + 3 * x.nbytes + 3 * kept.nbytes + 2 * b.nbytes
    systems = (
        ("dense products", dense, 1, 0),
        ("bmm of even experts", even, 1, forward_bytes),
        ("forward", forward, 1, forward_bytes),
        ("backward", backward, 2, backward_bytes),
    )
    graphs = [captured(run) for _, run, *_ in systems]
    # In turns: a GPU at its limit of power slows down, and whoever comes first would have more of it.
    times = [[event_milliseconds(graph.replay, 1)[0] for graph in graphs] for _ in range(ROUNDS)]
    rates: list[float] = []
    for (name, _, factor, moved), found in zip(systems, zip(*times, strict=True), strict=True):
        milliseconds, spread = median(found), (max(found) - min(found)) / median(found)
        rates.append(factor * operations / milliseconds / 1e9)
        note = f"{milliseconds:.3f} ms, {rates[-1] / rates[0]:.0%} of dense; goal 80%; bytes {moved / copy:.3f} ms"
        yield Row(f"{shape.name}, bf16, {MANY} tokens, {name}", "statespan", rates[-1], "TFLOP/s", spread, note)


def attend(query: Tensor, caches: list[list[Tensor]], position: Tensor, length: Tensor) -> None:
    """A token over each of the caches."""
    for key, value in caches:
        decode_attention(query, key, value, position, length=length)


def attention_rows(copy: float) -> Iterator[Row]:
    """Jamba's attention, 32 heads and 8 kv heads of 128."""
    for batch, slots in ((1, 8192), (8, 8192), (64, 8192), (1, 131072), (8, 131072), (1, 262144)):
        query = normal(batch, 32, 128)
        caches = [[normal(batch, slots, 8, 128) for _ in range(2)] for _ in range(8 if batch * slots < 10000 else 1)]
        position = torch.arange(slots, device="cuda", dtype=torch.int32).expand(batch, -1).contiguous()
        length = torch.tensor([slots], device="cuda", dtype=torch.int32)

        milliseconds, spread = graph_milliseconds(partial(attend, query, caches, position, length), calls=1)
        milliseconds /= len(caches)
        share = 2 * query.element_size() * batch * slots * 8 * 128 / milliseconds / copy
        note = f"{share:.0%} of copy bandwidth; goal 80%"
        task = f"decode_attention, batch {batch}, {slots} slots"
        yield Row(task, "statespan", milliseconds * 1e3, "us", spread, note)


def rows(only: str | None) -> Iterator[Row]:
    """All of them."""
    copy = copy_bandwidth()
    yield Row("copy of 512 MiB", "torch", copy / 1e6, "GB/s", 0.0)
    with torch.no_grad():
        if only in (None, "few"):
            yield launch_row()
        for shape in SHAPES:
            if only in (None, "few"):
                yield from few_rows(shape, copy)
            if only in (None, "many"):
                yield from many_rows(shape, copy)
        if only in (None, "attention"):
            yield from attention_rows(copy)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["few", "many", "attention"], help="rows an expert, or attention")
    report("gpu_experts", list(rows(parser.parse_args().only)), ["statespan", "torch", "triton"])


if __name__ == "__main__":
    main()
