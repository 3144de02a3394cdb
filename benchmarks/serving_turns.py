"""The second turn of a long conversation, and a short prompt beside a long one, on the CPU's demo model.

    python -m benchmarks.serving_turns [--tokens 100000] [--model CHECKPOINT]

A conversation of so many tokens is prefilled; the next turn adds 20. Its first token must come from the snapshot of the
first turn, in memory and, after a restart, from disk. Then short prompts come while another long one is prefilled: how
many steps and seconds each waits for its first token.
"""

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.record import Row, report
from benchmarks.serving_load import served_model
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request, Usage

OPTIONS = EngineOptions(max_rows=8, prefill_tokens=512, cache_bytes=1 << 30)


def turn(engine: Engine, prompt: list[int], new_tokens: int = 16) -> tuple[list[int], Usage]:
    """The reply to a prompt, greedy, and what it took."""
    options = GenerationOptions(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    engine.submit(Request(tuple(prompt), options))
    ids: list[int] = []
    while True:
        for event in engine.step():
            ids += event.token_ids
            if event.usage is not None:
                return ids, event.usage


def short_beside_long(engine: Engine, prompt: list[int], count: int = 12) -> tuple[int, float]:
    """The most steps and seconds that a short prompt waited while a long one was prefilled."""
    engine.submit(Request(tuple(prompt), GenerationOptions(max_new_tokens=1), id="long"))
    engine.step()
    steps, seconds = 0, 0.0
    for number in range(count):
        engine.submit(Request((number, 1, 2, 3), GenerationOptions(max_new_tokens=1, ignore_eos=True), id=f"{number}"))
        start_s, taken, ended = time.perf_counter(), 0, False
        while not ended:
            ended = any(event.request_id == f"{number}" for event in engine.step())
            taken += 1
        steps, seconds = max(steps, taken), max(seconds, time.perf_counter() - start_s)
    if engine.metrics().prefilling != 1:
        raise AssertionError("the long prompt ended too early to prove anything")
    engine.cancel("long")
    while not engine.idle:
        engine.step()
    return steps, seconds


def measure(model: LanguageModel, tokens: int, folder: Path) -> list[Row]:
    """All rows."""
    rng = random.Random(0)

    def drawn(count: int) -> list[int]:
        return [rng.randrange(model.config.vocab_size) for _ in range(count)]

    num_pages = tokens // OPTIONS.page_size * 2 + 64
    options = replace(OPTIONS, num_pages=num_pages, spill_dir=folder)
    engine = Engine(model, options)
    turn(engine, drawn(700))  # compiles kernels
    prompt = drawn(tokens)
    reply, first = turn(engine, prompt)
    second_prompt = [*prompt, *reply, *drawn(20)]
    expected, second = turn(engine, second_prompt)
    steps, seconds = short_beside_long(engine, drawn(tokens))
    engine.close()
    engine = Engine(model, options)
    turn(engine, drawn(700))
    again, restarted = turn(engine, second_prompt)
    engine.close()
    if again != expected:
        raise AssertionError(f"after the restart {again}, before it {expected}")
    task = f"conversation of {tokens:,} tokens"
    return [
        Row(task, "first turn, first token", first.first_token_s, "s", 0.0),
        Row(
            task, "second turn, first token", second.first_token_s, "s", 0.0, f"{second.cached_tokens:,} tokens reused"
        ),
        Row(
            task,
            "second turn after a restart",
            restarted.first_token_s,
            "s",
            0.0,
            f"{restarted.cached_tokens:,} reused",
        ),
        Row(task, "short prompt beside it", seconds, "s", 0.0, f"first token after {steps} step, the longest of 12"),
    ]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--model", help="a checkpoint; otherwise the demo's model with random weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(served_model(arguments.model), arguments.tokens, Path(folder))
    report("serving_turns", rows, ["statespan", "torch"])


if __name__ == "__main__":
    main()
