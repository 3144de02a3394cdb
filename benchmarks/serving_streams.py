"""A thousand clients at once: time to the first token and tokens a second, on the CPU's demo model.

    python -m benchmarks.serving_streams [--clients 1000] [--rows 64] [--model CHECKPOINT]

All requests come in the same moment, prompts of 16 to 128 tokens and 32 new ones each. Far more wait than run, so the
time to the first token is that in the queue.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass

from benchmarks.record import Row, report
from benchmarks.serving_load import alone, resident_bytes, served_model
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.serving.async_engine import AsyncEngine
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, Request, Usage


@dataclass(frozen=True)
class Outcome:
    """What the clients saw."""

    seconds: float
    tokens: int
    first_token_s: list[float]  # ascending
    compared: int  # replies that were as alone; others raise
    growth_bytes: int


async def serve(model: LanguageModel, clients: int, rows: int, new_tokens: int = 32) -> Outcome:
    """All clients at once."""
    rng = random.Random(0)
    engine = AsyncEngine(Engine(model, EngineOptions(max_rows=rows, num_pages=rows * 12 + 1, max_waiting=clients)))
    engine.start()
    requests = [
        Request(
            tuple(rng.randrange(model.config.vocab_size) for _ in range(rng.randrange(16, 129))),
            GenerationOptions(max_new_tokens=new_tokens, temperature=1.0, seed=number, ignore_eos=True),
        )
        for number in range(clients)
    ]
    before, start_s = resident_bytes(), time.monotonic()

    async def read(request: Request) -> list[Event]:
        return [event async for event in engine.stream(request)]

    replies = await asyncio.gather(*map(read, requests))
    seconds = time.monotonic() - start_s
    growth = resident_bytes() - before
    await engine.call(engine.engine.check)
    await engine.close()
    usages = [usage for reply in replies if (usage := reply[-1].usage) is not None]
    for reply in replies:
        if reply[-1].finish_reason != "length" or len(reply) != new_tokens:
            raise AssertionError(f"a reply is not whole: {reply[-1]}")
    compared = range(0, clients, max(1, clients // 20))
    for number in compared:
        ids = tuple(token for event in replies[number] for token in event.token_ids)
        if ids != alone(model, requests[number]):
            raise AssertionError(f"request {number} differs from what it gives alone")
    return Outcome(seconds, clients * new_tokens, _first_tokens(usages), len(compared), growth)


def _first_tokens(usages: list[Usage]) -> list[float]:
    return sorted(usage.first_token_s for usage in usages)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--model", help="a checkpoint; otherwise the demo's model with random weights")
    arguments = parser.parse_args()
    model = served_model(arguments.model)
    asyncio.run(serve(model, 4, 4, 4))  # compiles kernels
    found = asyncio.run(serve(model, arguments.clients, arguments.rows))
    task, first = f"{arguments.clients} streams at once, {arguments.rows} rows", found.first_token_s
    report(
        "serving_streams",
        [
            Row(task, "tokens", found.tokens / found.seconds, "tok/s", 0.0, f"{found.compared} replies as alone"),
            Row(task, "first token, median", first[len(first) // 2], "s", 0.0),
            Row(task, "first token, last of all", first[-1], "s", 0.0, f"all done after {found.seconds:.1f} s"),
            Row(task, "growth of the process", found.growth_bytes / 2**20, "MiB", 0.0),
        ],
        ["statespan", "torch"],
    )


if __name__ == "__main__":
    main()
