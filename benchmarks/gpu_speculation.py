"""What it costs on one GPU to verify k drafted tokens, beside single decoding steps, and what the engine makes of it.

    python -m benchmarks.gpu_speculation verify [--model mamba-1.4b]
    python -m benchmarks.gpu_speculation engine [--model mamba-1.4b] [--draft mamba-130m]
    python -m benchmarks.gpu_speculation generate [--model mamba-1.4b]

Random weights in bfloat16. A verify forward feeds k + 1 tokens a row (the newest one and k drafts), computes logits
at all of them and keeps the state after each, as a CUDA graph; a step is the decoder's graph. Where a forward costs r
steps, speculation wins when it gives more than r tokens a forward.

"engine" runs the serving engine with drafts that cost nothing and with a draft model ("none": without). Random weights
agree on nothing, so whether a draft is accepted is drawn here with a given chance, after all the work of drafting,
verifying and choosing has been done. "generate" looks up what such a model, which soon repeats itself, has said before.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.gpu_decode import built, seconds_of_graph
from benchmarks.record import Row, report
from statespan.generation import Generation, GenerationOptions, PromptLookup, Speculation, generate
from statespan.generation.pace import Pace
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
CHANCES = (0.2, 0.6, 0.8)  # of a draft to be accepted
NUM_DRAFTS, PROMPT, NEW = 4, 64, 128  # tokens of the engine's requests
LEARNING, TIMED = 2, 3  # waves of requests, with adaptive speculation
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
def seconds_of_verify(model: LanguageModel, batch: int, num_tokens: int) -> float:
    """Of a forward of `num_tokens` a row that keeps the state after each, as a graph."""
    ids = torch.randint(10, model.config.vocab_size, (batch * num_tokens,), device="cuda")
    active = torch.ones(batch, dtype=torch.int32, device="cuda")
    memory, kept = model.new_state(batch), model.new_state(batch * num_tokens)
    decoder = model.verify_decoder(batch, num_tokens, memory=memory, kept=kept, active=active)
    assert decoder is not None  # the model has such steps
    run = decoder.captured(lambda: decoder(ids))
    run()  # kernels are compiled
    gc.collect()  # an old graph must not go while a new one is captured
    run()
    return seconds_of(run)


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


def tokens_a_second(engine: Engine, batch: int, waves: int = 1) -> float:
    """Of greedy requests, as long as all rows run: neither prompts count nor the last steps of who fell behind."""
    options = GenerationOptions(max_new_tokens=NEW, temperature=0, ignore_eos=True)
    count, seconds = 0, 0.0
    for _ in range(waves):
        prompts = [[random.randrange(engine.model.config.vocab_size) for _ in range(PROMPT)] for _ in range(batch)]
        requests = [Request(tuple(prompt), options, reuse=False) for prompt in prompts]
        for request in requests:
            engine.submit(request)
        while len(engine.rows.active) < batch:
            engine.step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        while len(engine.rows.active) == batch:
            count += sum(len(event.token_ids) for event in engine.step())
        torch.cuda.synchronize()
        seconds += time.perf_counter() - started
        for request in requests:
            engine.cancel(request.id)
        while not engine.idle:
            engine.step()
    return count / seconds


class SameDrafts:
    """Drafts that cost nothing, as those of prompt look-up."""

    def propose(self, samples: Sequence[Sample], counts: Sequence[int]) -> list[tuple[int, ...]]:
        return [(1,) * count for count in counts]

    def warm_up(self) -> None:
        pass


def measure_engine(model: LanguageModel, name: str, draft_name: str, batches: Sequence[int]) -> None:
    """Tokens a second, plain and with drafts at each chance, always or only while that is faster."""
    draft = None if draft_name == "none" else built(preset(draft_name))
    engine = Engine(model, EngineOptions(max_rows=max(batches), num_drafts=NUM_DRAFTS, cache_bytes=0), draft=draft)
    assert isinstance(engine.decode, SpeculativeDecode)  # there are drafts
    system, drafter = (draft_name, engine.decode.drafter) if draft is not None else ("look-up", SameDrafts())
    plain = PlainDecode(engine.runner, model.config.vocab_size, model.device, ahead=True)
    choice = DrawnChoice(engine.runner, model.config.vocab_size, model.device, ahead=True)
    decode = SpeculativeDecode(choice, engine.runner, num_drafts=NUM_DRAFTS, drafter=drafter, adaptive=False)
    choice.chance = 0.9
    for batch in batches:
        for way in (decode, plain):
            engine.use(way)
            tokens_a_second(engine, batch)  # captures
        base = tokens_a_second(engine, batch, waves=2)
        task = f"{name}, batch {batch}, engine, {NUM_DRAFTS} drafts"
        rows = [Row(task, "plain", base, "tok/s", 0.0)]
        engine.use(decode)
        for adaptive in (False, True):
            decode.pace = Pace() if adaptive else None
            for choice.chance in CHANCES:
                if adaptive:  # what the chance is now, it must find out
                    tokens_a_second(engine, batch, LEARNING)
                before = replace(decode.report)
                rate, after = tokens_a_second(engine, batch, TIMED if adaptive else 1), decode.report
                accepted, count = after.accepted - before.accepted, after.drafted - before.drafted
                told = f"{accepted / count:.0%} of {count} drafts came true" if count else "it was off"
                note = f"{rate / base:.2f} x plain; {told}, each with chance {choice.chance}"
                way = f"{system}, {'adaptive' if adaptive else 'on'}, chance {choice.chance}"
                rows.append(Row(task, way, rate, "tok/s", 0.0, note))
                print(task, way, note, flush=True)
        report("gpu_speculation", rows, ["statespan", "torch", "triton", "cuda-core"])


def generated(
    model: LanguageModel, prompts: list[list[int]], speculation: Speculation | None
) -> tuple[list[Generation], float]:
    """What is generated, and the seconds that it takes."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    options = {"max_new_tokens": 2 * NEW, "temperature": 0, "ignore_eos": True}
    found = generate(model, prompts, speculation=speculation, **options)
    return found, time.perf_counter() - started


def measure_generate(name: str, batches: Sequence[int]) -> None:
    """`generate` with prompt look-up behind prompts that repeat themselves, beside plain decoding."""
    model, versions = built(preset(name)), ["statespan", "torch", "triton", "cuda-core"]
    for batch in batches:
        prompts = [[random.randrange(model.config.vocab_size) for _ in range(16)] * 8 for _ in range(batch)]
        texts: list[list[tuple[int, ...]]] = []
        rates: list[float] = []
        for way in (None, False, True):
            speculation = None if way is None else Speculation(PromptLookup(), NUM_DRAFTS, adaptive=way)
            generated(model, prompts, speculation)  # captures
            found, seconds = generated(model, prompts, speculation)
            texts.append([one.token_ids for one in found])
            rates.append(batch * 2 * NEW / seconds)
            label = "plain" if way is None else f"look-up, {'adaptive' if way else 'on'}"
            same = sum(
                a == b
                for ours, plain in zip(texts[-1], texts[0], strict=True)
                for a, b in zip(ours, plain, strict=True)
            )
            told = found[0].speculation
            note = f"{rates[-1] / rates[0]:.2f} x plain, prompts counted; {same} of {batch * 2 * NEW} tokens as plain"
            note += "" if told is None else f"; {told.acceptance:.0%} of {told.drafted} drafts came true"
            row = Row(f"{name}, batch {batch}, generate, {NUM_DRAFTS} drafts", label, rates[-1], "tok/s", 0.0, note)
            report("gpu_speculation", [row], versions)


def measure_verify(name: str, batches: Sequence[int]) -> None:
    """A verify forward of each number of drafts, at each batch size."""
    model = built(preset(name))
    for batch in batches:
        rows: list[Row] = []
        step, _ = seconds_of_graph(model, batch)
        rows.append(Row(f"{name}, batch {batch}", "step, graph", step * 1e3, "ms", 0.0))
        for drafts in DRAFTS:
            seconds = seconds_of_verify(model, batch, drafts + 1)
            cost = seconds / step
            needed = f"{cost:.2f} steps; {max(0.0, cost - 1) / drafts:.0%} of the drafts must be accepted"
            rows.append(
                Row(f"{name}, batch {batch}, verify {drafts} drafts", "graph", seconds * 1e3, "ms", 0.0, needed)
            )
        report("gpu_speculation", rows, ["statespan", "torch", "triton", "cuda-core"])


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verify", "engine", "generate"), help="what to measure")
    parser.add_argument("--model", default="mamba-1.4b", help="a preset without attention (default: %(default)s)")
    parser.add_argument("--draft", default="mamba-130m", help="a preset of the same vocabulary (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="rows (default: 1 8 64)")
    arguments = parser.parse_args()
    if arguments.what == "verify":
        measure_verify(arguments.model, arguments.batch)
    elif arguments.what == "generate":
        measure_generate(arguments.model, arguments.batch)
    else:
        model = built(preset(arguments.model))
        for draft in dict.fromkeys(("none", arguments.draft)):
            measure_engine(model, arguments.model, draft, arguments.batch)


if __name__ == "__main__":
    main()
