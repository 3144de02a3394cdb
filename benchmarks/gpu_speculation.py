"""What it costs on one GPU to verify k drafted tokens, beside single decoding steps, and what the engine makes of it.

    python -m benchmarks.gpu_speculation verify [--model mamba-1.4b]
    python -m benchmarks.gpu_speculation engine [--model mamba-1.4b] [--draft mamba-130m]

Random weights in bfloat16. A verify forward feeds k + 1 tokens a row (the newest one and k drafts) from a kept state
and computes logits at all of them, as a CUDA graph and without one; a step is the decoder's graph. Where a forward
costs r steps, speculation wins when it gives more than r tokens a forward.

"engine" runs the serving engine with a draft model. Random weights agree on nothing, so whether a draft is accepted is
drawn here with a given chance, after all the work of drafting, verifying and choosing has been done.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu_decode import built, seconds_of_graph
from benchmarks.record import Row, report
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset
from statespan.serving.adjustments import Drafts
from statespan.serving.decode import Failed, PlainDecode
from statespan.serving.engine import Engine
from statespan.serving.job import Chosen, Sample
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.speculative import SpeculativeDecode

BATCHES, DRAFTS = (1, 8, 64), (1, 2, 3, 4, 6, 8)
CHANCES, NUM_DRAFTS, PROMPT, NEW = (
    (0.6, 0.8),
    4,
    64,
    128,
)  # of a draft to be accepted; tokens of the engine's requests
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


class DrawnChoice(PlainDecode):
    """Chooses, and then lets a draft pass with a given chance whatever was chosen."""

    chance, random = 0.0, random.Random(0)

    def choose(
        self, logits: torch.Tensor, samples: Sequence[Sample], drafts: Drafts | None = None
    ) -> list[list[Chosen] | Failed]:
        outcomes = super().choose(logits, samples, drafts)
        if drafts is None:
            return outcomes
        drawn: list[list[Chosen] | Failed] = []
        for outcome, draft in zip(outcomes, drafts, strict=True):
            assert not isinstance(outcome, Failed)  # the weights are sound
            wrong = (place for place in range(len(draft)) if self.random.random() >= self.chance)
            count = next(wrong, len(draft))
            drawn.append([*(Chosen(token) for token in draft[:count]), outcome[-1]])
        return drawn


def tokens_a_second(engine: Engine, batch: int) -> float:
    """Of greedy requests that run side by side, prompts not counted."""
    options = GenerationOptions(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    for _ in range(batch):
        prompt = tuple(random.randrange(engine.model.config.vocab_size) for _ in range(PROMPT))
        engine.submit(Request(prompt, options, reuse=False))
    for _ in range(3):
        engine.step()
    torch.cuda.synchronize()
    started, count = time.perf_counter(), 0
    while not engine.idle:
        count += sum(len(event.token_ids) for event in engine.step())
    torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


class SameDrafts:
    """Drafts that cost nothing, as those of prompt look-up."""

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        return [(1,) * count for count in counts]


def measure_engine(name: str, draft_name: str, batches: Sequence[int]) -> None:
    """Tokens a second, plain and with drafts at each chance."""
    model, draft = built(preset(name)), built(preset(draft_name))
    plain = Engine(model, EngineOptions(max_rows=64))
    drafted = Engine(model, EngineOptions(max_rows=64, num_drafts=NUM_DRAFTS), draft=draft)
    assert isinstance(drafted.decode, SpeculativeDecode)  # there are drafts
    choice = DrawnChoice(drafted.runner, model.config.vocab_size, model.device)
    decode = SpeculativeDecode(
        choice, drafted.runner, num_drafts=NUM_DRAFTS, drafter=drafted.decode.drafter, adaptive=False
    )
    drafted.use(decode)
    drafters = {draft_name: decode.drafter, "look-up": SameDrafts()}
    for batch in batches:
        rows: list[Row] = []
        tokens_a_second(plain, batch)  # captures
        base = tokens_a_second(plain, batch)
        rows.append(Row(f"{name}, batch {batch}, engine", "plain", base, "tok/s", 0.0))
        for system, drafter in drafters.items():
            decode.drafter, choice.chance = drafter, CHANCES[0]
            tokens_a_second(drafted, batch)  # captures
            for choice.chance in CHANCES:
                rate = tokens_a_second(drafted, batch)
                note = f"{rate / base:.2f} x plain; {NUM_DRAFTS} drafts, each accepted with chance {choice.chance}"
                rows.append(Row(f"{name}, batch {batch}, engine", system, rate, "tok/s", 0.0, note))
        report("gpu_speculation", rows, ["statespan", "torch", "triton", "cuda-core"])


def measure_verify(name: str, batches: Sequence[int]) -> None:
    """A verify forward of each number of drafts, at each batch size."""
    model = built(preset(name))
    for batch in batches:
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


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "engine"), help="what to measure")
    parser.add_argument("--model", default="mamba-1.4b", help="a preset without attention (default: %(default)s)")
    parser.add_argument("--draft", default="mamba-130m", help="a preset of the same vocabulary (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="rows (default: 1 8 64)")
    arguments = parser.parse_args()
    if arguments.what == "verify":
        measure_verify(arguments.model, arguments.batch)
    else:
        measure_engine(arguments.model, arguments.draft, arguments.batch)


if __name__ == "__main__":
    main()
