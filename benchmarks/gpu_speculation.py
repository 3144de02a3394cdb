"""What it costs on one GPU to verify k drafted tokens, beside single decoding steps: the acceptance that breaks even.

    python -m benchmarks.gpu_speculation [--model mamba-1.4b]

Random weights in bfloat16. A verify forward feeds k + 1 tokens a row (the newest one and k drafts) from a kept state
and computes logits at all of them, as a CUDA graph and without one; a step is the decoder's graph. Where a forward
costs r steps, speculation wins when it gives more than r tokens a forward.
"""

import argparse
import gc
from collections.abc import Callable

import torch

from benchmarks.gpu_decode import built, seconds_of_graph
from benchmarks.record import Row, report
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset

BATCHES, DRAFTS = (1, 8, 64), (1, 2, 3, 4, 6, 8)
SECONDS = 0.15  # of each timing


def seconds_of(run: Callable[[], object]) -> float:
    """On the device, of one call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    count = 3
    while True:
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        if seconds > SECONDS / 4:
            return seconds / count
        count *= 4


@torch.inference_mode()
def seconds_of_verify(model: LanguageModel, batch: int, num_tokens: int) -> tuple[float, float]:
    """Of a forward of `num_tokens` a row: as a graph, and launched kernel by kernel."""
    ids = torch.randint(10, model.config.vocab_size, (batch, num_tokens), device="cuda")
    state = model.new_state(batch)

    def forward() -> None:
        model(ids, state=state)

    forward()
    torch.cuda.synchronize()
    eager = seconds_of(forward)
    gc.collect()  # an old graph must not go while a new one is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        forward()
    return seconds_of(graph.replay), eager


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mamba-1.4b", help="a preset without attention (default: %(default)s)")
    name = parser.parse_args().model
    model = built(preset(name))
    for batch in BATCHES:
        rows: list[Row] = []
        step, _ = seconds_of_graph(model, batch)
        rows.append(Row(f"{name}, batch {batch}", "step, graph", step * 1e3, "ms", 0.0))
        for drafts in DRAFTS:
            graph, eager = seconds_of_verify(model, batch, drafts + 1)
            cost = graph / step
            needed = f"{cost:.2f} steps; {max(0.0, cost - 1) / drafts:.0%} of the drafts must be accepted"
            rows.append(Row(f"{name}, batch {batch}, verify {drafts} drafts", "graph", graph * 1e3, "ms", 0.0, needed))
            rows.append(Row(f"{name}, batch {batch}, verify {drafts} drafts", "eager", eager * 1e3, "ms", 0.0))
        report("gpu_speculation", rows, ["statespan", "torch", "triton", "cuda-core"])


if __name__ == "__main__":
    main()
