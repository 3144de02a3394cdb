"""Many clients for many minutes: cancellations at random, books checked, replies compared, memory watched.

    python -m benchmarks.serving_soak --minutes 30 [--clients 48] [--model CHECKPOINT]

Clients hold conversations over an AsyncEngine; a third of the requests are cancelled at a random moment, by the client
or by a deadline, some have two samples. After each 1,000 requests rows, pages and prefix cache are checked against each
other, and replies drawn by chance are compared with `generate` alone. At the end everything must have been given back.
Memory growth is taken from the first third of the run, when caches have filled, to the end.
"""

import argparse
import asyncio
import gc
import math
import random
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.record import Row, report
from benchmarks.serving_load import Conversation, alone, resident_bytes, served_model
from statespan.models.language_model import LanguageModel
from statespan.serving.async_engine import AsyncEngine
from statespan.serving.engine import Engine
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, Request

CHECK_EVERY, COMPARE_ONE_IN = 1000, 200
SETTLE_S = 10.0  # for what was cancelled last to leave
OPTIONS = EngineOptions(max_rows=24, num_pages=1200, cache_bytes=24 << 20, spill_bytes=16 << 20, prefill_tokens=512)


@dataclass
class Outcome:
    """What a soak found; it raises where something is wrong."""

    requests: int = 0
    cancelled: int = 0  # by clients and deadlines
    checks: int = 0
    compared: int = 0
    seconds: float = 0.0
    growth_bytes: int = 0  # of the process, after the caches had filled
    metrics: EngineMetrics = field(default_factory=EngineMetrics)


class Soak:
    """Clients of one engine, until `seconds` are over, or so many requests."""

    def __init__(self, model: LanguageModel, options: EngineOptions, seconds: float, requests: float) -> None:
        self.model, self.seconds, self.requests = model, seconds, requests
        self.engine = AsyncEngine(Engine(model, options))
        self.outcome, self.start_s = Outcome(), time.monotonic()
        self._filled_bytes = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.start_s

    async def run(self, clients: int) -> Outcome:
        """All clients to their end, then the last checks."""
        self.engine.start()
        await asyncio.gather(*(self._client(number) for number in range(clients)))
        await self._settle()
        await self.engine.call(self.engine.engine.check)
        outcome, metrics = self.outcome, self.engine.engine.metrics()
        if metrics.decoding or metrics.prefilling or metrics.waiting or metrics.failures:
            raise AssertionError(f"something is left, or failed: {metrics}")
        gc.collect()
        outcome.seconds, outcome.metrics = self.elapsed_s, metrics
        outcome.growth_bytes = resident_bytes() - (self._filled_bytes or resident_bytes())
        await self.engine.close()
        pages = self.engine.engine.pool.pages
        if pages.num_free != pages.num_pages - 1:
            raise AssertionError(f"{pages.num_pages - 1 - pages.num_free} pages were not given back")
        return outcome

    async def _settle(self) -> None:
        """What clients cancelled last leaves at the engine's next step."""
        end = time.monotonic() + SETTLE_S
        while not self.engine.engine.idle and time.monotonic() < end:
            await asyncio.sleep(0.01)

    async def _client(self, number: int) -> None:
        rng = random.Random(f"client {number}")
        conversation, count = Conversation(rng, self.model.config.vocab_size), 0
        while self.elapsed_s < self.seconds and self.outcome.requests < self.requests:
            request = conversation.next_request(f"{number}.{count}", new_tokens=40)
            conversation.tokens += await self._reply(request, rng)
            count += 1
            await self._note()

    async def _reply(self, request: Request, rng: random.Random) -> list[int]:
        """The first sample's tokens, or what came of them."""
        leaves_after = rng.randrange(1, 30) if rng.random() < 0.3 else None  # events
        if rng.random() < 0.05:
            request = Request(request.prompt, request.options, request.id, deadline_s=rng.random())
        replies: dict[int, list[int]] = {index: [] for index in range(request.num_samples)}
        ends: list[Event] = []
        stream = self.engine.stream(request)
        async for event in stream:
            replies[event.index] += event.token_ids
            if event.finish_reason is not None:
                ends.append(event)
            if leaves_after is not None:
                leaves_after -= 1
                if leaves_after == 0 and len(ends) < request.num_samples:
                    await stream.aclose()
                    self.outcome.cancelled += 1
                    return replies[0]
        for end in ends:
            if end.finish_reason == "error":
                raise AssertionError(end.error)
            self.outcome.cancelled += end.finish_reason == "deadline"
        if all(end.finish_reason == "length" for end in ends) and rng.random() < 1 / COMPARE_ONE_IN:
            await self._compare(request, replies)
        return replies[0]

    async def _compare(self, request: Request, replies: dict[int, list[int]]) -> None:
        for index, ids in replies.items():
            expected = await self.engine.call(lambda index=index: alone(self.model, request, index))
            if tuple(ids) != expected:
                raise AssertionError(f"request {request.id}, sample {index}: {ids} differs from {expected} alone")
            self.outcome.compared += 1

    async def _note(self) -> None:
        """A request has ended."""
        self.outcome.requests += 1
        if self.outcome.requests % CHECK_EVERY == 0:
            await self.engine.call(self.engine.engine.check)
            self.outcome.checks += 1
        if not self._filled_bytes and self.elapsed_s > self.seconds / 3:
            gc.collect()
            self._filled_bytes = resident_bytes()


def soak(
    model: LanguageModel, options: EngineOptions, *, seconds: float, clients: int, requests: float = math.inf
) -> Outcome:
    """Run one; raises where a reply, the books or the memory are wrong."""
    return asyncio.run(_soak(model, options, seconds, clients, requests))


async def _soak(model: LanguageModel, options: EngineOptions, seconds: float, clients: int, requests: float) -> Outcome:
    return await Soak(model, options, seconds, requests).run(clients)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--model", help="a checkpoint; otherwise the demo's model with random weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = replace(OPTIONS, spill_dir=Path(folder), spill_dir_bytes=64 << 20)
        found = soak(served_model(arguments.model), options, seconds=60 * arguments.minutes, clients=arguments.clients)
    metrics = found.metrics
    task = f"soak, {found.seconds / 60:.1f} min, {arguments.clients} clients"
    note = f"{found.cancelled:,} cancelled; {found.checks} checks of the books, {found.compared} replies as alone"
    cache = f"{metrics.cache_snapshots} snapshots, {metrics.spilled:,} spilled, {metrics.spill_restored:,} restored"
    report(
        "serving_soak",
        [
            Row(task, "requests", found.requests, "", 0.0, note),
            Row(task, "tokens", metrics.generated_tokens / found.seconds, "tok/s", 0.0),
            Row(task, "prompt tokens reused", 100 * metrics.cache_hit_rate, "%", 0.0, cache),
            Row(task, "growth of the process", found.growth_bytes / 2**20, "MiB", 0.0, "after a third of the time"),
        ],
        ["statespan", "torch"],
    )


if __name__ == "__main__":
    main()
