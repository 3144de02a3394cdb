"""Speculative decoding on the demo model: acceptance and speed beside plain decoding, at batch 1, 8 and 64.

    statespan demo                          # makes demo-output
    python -m benchmarks.speculation        # trains two drafters in a minute, then measures statespan.generate
    python -m benchmarks.speculation --engine                     # the same through the serving engine

The drafters are a byte model a tenth of the demo's size and a subword model (MambaByte's form), trained on the demo's
corpus and kept in demo-output/drafters. "continue" goes on with held-out source; "repeat" has begun to say its prompt
again, which is what prompt look-up is for. Greedy. The last table is what a verify forward costs in single steps.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import statespan
from benchmarks.record import Row, report
from benchmarks.timing import time_in_turns
from statespan.generation import DraftModel, PromptLookup, Speculation, SubwordDrafter
from statespan.generation.drafters import Drafter
from statespan.generation.options import GenerationOptions
from statespan.generation.steps import feed
from statespan.layers.config import Mamba1Config
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.speculative import SpeculativeDecode
from statespan.training import DataConfig, OptimizerConfig, RunConfig, TrainingConfig, train

BATCHES = (1, 8, 64)
PROMPT, NEW = 384, 96
DRAFTS = {"look-up": 12, "draft model": 4, "subword model": 8}


@dataclass(frozen=True)
class Measure:
    """How long to look, and at which clock."""

    repetitions: int
    cpu_time: bool

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter

    @property
    def unit(self) -> str:
        return "tok/CPU s" if self.cpu_time else "tok/s"


def trained(name: str, demo: Path, seconds: float, vocab_size: int, tokenizer: str) -> LanguageModel:
    """A small Mamba of the demo's corpus; it is trained once."""
    folder = demo / "drafters" / name
    if not folder.exists():
        config = TrainingConfig(
            model=ModelConfig(
                vocab_size=vocab_size,
                hidden_size=96,
                layers=(LayerSpec("mamba1"),) * 2,
                mamba1=Mamba1Config(state_size=8),
            ),
            data=DataConfig(train=str(demo / "corpus" / "train"), tokenizer=tokenizer, sequence_length=256),
            optimizer=OptimizerConfig(learning_rate=5e-3),
            run=RunConfig(max_steps=None, max_seconds=seconds, batch_size=8),
        )
        statespan.convert(train(config, demo / "drafters" / f"{name}-run").checkpoint, folder)
    return statespan.load(folder)


def words(demo: Path, vocab_size: int) -> str:
    """A byte-pair tokenizer of the demo's corpus."""
    file = demo / "drafters" / "tokenizer.json"
    if not file.exists():
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        backend.train([str(path) for path in sorted((demo / "corpus" / "train").rglob("*.py"))], trainer)
        file.parent.mkdir(parents=True, exist_ok=True)
        backend.save(str(file))
    return str(file)


def prompts(demo: Path, batch: int, task: str) -> list[list[int]]:
    """Prompts of one length from held-out files."""
    texts = [path.read_bytes() for path in sorted((demo / "corpus" / "held-out").rglob("*.py"))]
    texts = [text[1000 : 1000 + PROMPT] for text in texts if len(text) > 1000 + PROMPT]
    pieces = [list(texts[place % len(texts)]) for place in range(batch)]
    return pieces if task == "continue" else [[*piece, *piece[: PROMPT // 4]] for piece in pieces]


def rows_of(
    demo: Path, model: LanguageModel, drafters: dict[str, Drafter], task: str, batch: int, measure: Measure
) -> Iterator[Row]:
    """Tokens a second of each way; the ways take turns."""
    given = prompts(demo, batch, task)
    rates: dict[str, list[float]] = {}
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}

    def run(name: str, speculation: Speculation | None) -> None:
        started = 0.0
        for _ in statespan.generate_stream(model, given, speculation=speculation, **options):
            started = started or measure.clock()
        rates.setdefault(name, []).append(batch * (NEW - 1) / (measure.clock() - started))

    ways: dict[str, Speculation | None] = {"plain": None}
    for name, drafter in drafters.items():
        ways[name] = Speculation(drafter, DRAFTS[name], adaptive=False)
        ways[f"{name}, adaptive"] = Speculation(drafter, DRAFTS[name])
    time_in_turns({name: partial(run, name, way) for name, way in ways.items()}, repetitions=measure.repetitions)
    plain = _median(rates["plain"][1:])
    for name, (_, *values) in rates.items():  # the first one warmed up
        note = f"{_median(values) / plain:.2f} x plain"
        if ways[name] is not None:
            found = statespan.generate(model, given, speculation=ways[name], **options)[0].speculation
            assert found is not None  # speculation was asked for
            share = found.tokens / batch / (found.verify_steps + found.plain_steps)
            note += f", {found.acceptance:.0%} of the drafts accepted, {share:.2f} tokens a row and step"
        spread = (max(values) - min(values)) / _median(values)
        yield Row(f"demo model, {task}, batch {batch}", name, _median(values), measure.unit, spread, note)


def engine_rows(
    demo: Path, model: LanguageModel, drafts: dict[str, LanguageModel | None], task: str, batch: int, measure: Measure
) -> Iterator[Row]:
    """Tokens a second of the serving engine, all requests at once; the ways take turns."""
    given = prompts(demo, batch, task)
    rates: dict[str, list[float]] = {}
    engines = {"plain": Engine(model, EngineOptions(max_rows=batch, cache_bytes=0))}
    for name, draft in drafts.items():
        options = EngineOptions(max_rows=batch, cache_bytes=0, num_drafts=DRAFTS[name])
        for way, adaptive in ((name, False), (f"{name}, adaptive", True)):
            engine = engines[way] = Engine(model, options, draft=draft)
            assert isinstance(engine.decode, SpeculativeDecode)  # there are drafts
            engine.decode.clock = measure.clock
            if not adaptive:
                engine.decode.pace = None

    def run(name: str, engine: Engine) -> None:
        options = GenerationOptions(max_new_tokens=NEW, temperature=0, ignore_eos=True)
        for prompt in given:
            engine.submit(Request(tuple(prompt), options))
        while len(engine.rows.active) < batch:
            engine.step()
        started, count = measure.clock(), 0
        while not engine.idle:
            count += sum(len(event.token_ids) for event in engine.step())
        rates.setdefault(name, []).append(count / (measure.clock() - started))

    time_in_turns(
        {name: partial(run, name, engine) for name, engine in engines.items()}, repetitions=measure.repetitions
    )
    plain_rate = _median(rates["plain"][1:])
    for name, (_, *values) in rates.items():  # the first one warmed up
        note, decode = f"{_median(values) / plain_rate:.2f} x plain", engines[name].decode
        if isinstance(decode, SpeculativeDecode):
            found = decode.report
            share = found.tokens / batch / (found.verify_steps + found.plain_steps)
            note += f", {found.acceptance:.0%} of the drafts accepted, {share:.2f} tokens a row and step"
        spread = (max(values) - min(values)) / _median(values)
        yield Row(f"demo model, engine, {task}, batch {batch}", name, _median(values), measure.unit, spread, note)


def costs(model: LanguageModel, name: str, batches: Sequence[int], measure: Measure) -> Iterator[Row]:
    """What a verify forward costs beside a single step."""
    for batch in batches:
        decoder, ids = model.decoder(batch), torch.randint(0, 256, (batch, 33))
        with torch.inference_mode():
            _, state = feed(model, ids.tolist(), model.new_state(batch))
            decoder.start(state, 1000)
            candidates: dict[str, Callable[[], object]] = {"step": partial(decoder, ids[:, 0].contiguous())}
            for drafts in (2, 4, 8, 16, 32):
                candidates[f"{drafts} drafts"] = partial(feed, model, ids[:, : drafts + 1].tolist(), state)
            timings = time_in_turns(candidates, repetitions=9, seconds_each=4, clock=measure.clock)
        step = timings["step"].median_s
        for system, timing in timings.items():
            note = "" if system == "step" else f"{timing.median_s / step:.1f} steps"
            yield Row(f"{name}, batch {batch}, verify", system, timing.median_s * 1e3, "ms", timing.spread, note)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-output"), help="folder of the demo")
    parser.add_argument("--preset", help="only what verifying costs a model of this size, with random weights")
    parser.add_argument("--engine", action="store_true", help="measure the serving engine, not statespan.generate")
    parser.add_argument("--seconds", type=float, default=30, help="training of each drafter (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="rows (default: 1 8 64)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="of one thread: what else runs matters less")
    parser.add_argument("--threads", type=int, help="of torch (default: all)")
    arguments = parser.parse_args()
    if arguments.cpu_time or arguments.threads is not None:
        torch.set_num_threads(arguments.threads or 1)
    packages = ["statespan", "torch", "numba"]
    if arguments.preset is not None:
        measure, model = Measure(arguments.repetitions, arguments.cpu_time), statespan.build(arguments.preset).eval()
        report("speculation", [*costs(model, arguments.preset, arguments.batch, measure)], packages)
        return
    demo, measure = arguments.demo, Measure(arguments.repetitions, arguments.cpu_time)
    small = trained("bytes", demo, arguments.seconds, 256, "bytes")
    subword = trained("words", demo, arguments.seconds, 2048, words(demo, 2048))
    drafters: dict[str, Drafter] = {
        "look-up": PromptLookup(shortest=5),
        "draft model": DraftModel(small),
        "subword model": SubwordDrafter(subword),
    }
    model = statespan.load(demo / "checkpoint")
    if arguments.engine:
        drafts = {"look-up": None, "draft model": small, "subword model": subword}
        for batch in arguments.batch:
            for task in ("continue", "repeat"):
                report("speculation", [*engine_rows(demo, model, drafts, task, batch, measure)], packages)
        return
    for batch in arguments.batch:
        for task in ("continue", "repeat"):
            report("speculation", [*rows_of(demo, model, drafters, task, batch, measure)], packages)
    report("speculation", [*costs(model, "demo model", arguments.batch, measure)], packages)


if __name__ == "__main__":
    main()
