"""Streams over the engine's thread: every event arrives, nobody waits for ever, nothing is left."""

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

import statespan
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.serving.async_engine import AsyncEngine, RequestStream
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, QueueFull, Request, RequestRefused

OPTIONS = EngineOptions(max_rows=8, num_pages=400, page_size=4)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 300))


def request(first: int = 1, count: int = 5, **keywords: Any) -> Request:
    options = GenerationOptions(max_new_tokens=count, temperature=1.0, seed=first)
    return Request((first % 61, 2, 3), options, id=f"{first}", **keywords)


def started(model: LanguageModel, options: EngineOptions = OPTIONS) -> AsyncEngine:
    engine = AsyncEngine(Engine(model, options))
    engine.start()
    return engine


async def read(stream: RequestStream) -> list[Event]:
    return [event async for event in stream]


async def until(holds: Any) -> None:
    while not holds():
        await asyncio.sleep(0.005)


def test_a_thousand_streams_at_once(hybrid: LanguageModel) -> None:
    """More than there are rows: all are served, each with its own tokens."""

    async def all_of_them() -> None:
        engine = started(hybrid)
        streams = [engine.stream(request(number, count=3)) for number in range(1000)]
        replies = await asyncio.gather(*map(read, streams))
        for number in range(0, 1000, 97):
            ids = [token for event in replies[number] for token in event.token_ids]
            alone = statespan.generate(hybrid, [number % 61, 2, 3], max_new_tokens=3, seed=number)
            assert tuple(ids) == alone.token_ids
        assert all(reply[-1].finish_reason == "length" and len(reply) == 3 for reply in replies)
        assert engine.engine.metrics().finished == {"length": 1000}
        engine.engine.check()
        await engine.close()

    run(all_of_them())


def test_events_come_one_by_one(hybrid: LanguageModel) -> None:
    async def read_slowly() -> None:
        engine = started(hybrid)
        stream = engine.stream(request(count=4, num_samples=2))
        first = await anext(stream)
        assert first.finish_reason is None and len(first.token_ids) == 1
        rest = await read(stream)
        assert sorted((event.index, event.finish_reason) for event in rest if event.finish_reason) == [
            (0, "length"),
            (1, "length"),
        ]
        assert len(rest) == 7
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        await engine.close()

    run(read_slowly())


@pytest.mark.parametrize("way", ["aclose", "drop", "cancel the task"])
def test_a_reader_that_goes_away_cancels(hybrid: LanguageModel, way: str) -> None:
    async def leave() -> None:
        engine = started(hybrid)
        stream = engine.stream(request(count=1000))
        await anext(stream)
        if way == "aclose":
            await stream.aclose()
            await stream.aclose()
        elif way == "drop":
            del stream
            gc.collect()
        else:
            task = asyncio.create_task(read(stream))
            del stream
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
            gc.collect()
        await until(lambda: engine.engine.idle)
        assert engine.engine.metrics().finished == {"cancelled": 1}
        engine.engine.check()
        assert (await read(engine.stream(request())))[-1].finish_reason == "length"
        await engine.close()

    run(leave())


def test_what_is_refused_raises_at_once(hybrid: LanguageModel) -> None:
    async def refuse() -> None:
        engine = AsyncEngine(Engine(hybrid, EngineOptions(max_rows=1, num_pages=400, page_size=4, max_waiting=1)))
        with pytest.raises(RequestRefused, match="not running"):
            engine.stream(request())
        engine.start()
        with pytest.raises(RequestRefused, match="need"):
            engine.stream(request(count=10_000))
        running = engine.stream(request(1, count=1000))
        await anext(running)
        waiting = engine.stream(request(2))
        with pytest.raises(QueueFull):
            engine.stream(request(3))
        with pytest.raises(RequestRefused, match="in use"):
            engine.stream(request(1))
        await running.aclose()
        assert (await read(waiting))[-1].finish_reason == "length"
        await engine.close()

    run(refuse())


def test_closing_lets_requests_end_or_cancels_them(hybrid: LanguageModel) -> None:
    async def drain(seconds: float, count: int, reason: str) -> None:
        engine = started(hybrid)
        stream = engine.stream(request(count=count))
        await anext(stream)
        closing = asyncio.create_task(engine.close(drain_s=seconds))
        await asyncio.sleep(0)
        with pytest.raises(RequestRefused, match="shutting down"):
            engine.stream(request(2))
        assert (await read(stream))[-1].finish_reason == reason
        await closing
        assert not engine.running
        assert engine.engine.pool.pages.num_free == 399

    run(drain(30, 20, "length"))
    run(drain(0, 1500, "cancelled"))


def test_embeddings_and_calls_run_between_steps(hybrid: LanguageModel) -> None:
    async def embed() -> None:
        engine = started(hybrid)
        alone = await engine.embed([(1, 2, 3), (4,)])
        stream = engine.stream(request(count=50))
        await anext(stream)
        torch.testing.assert_close(await engine.embed([(1, 2, 3), (4,)]), alone)
        with pytest.raises(RequestRefused, match="empty"):
            await engine.embed([()])
        assert await engine.call(lambda: engine.engine.metrics().decoding) == 1
        await stream.aclose()
        await engine.close()

    run(embed())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_broke(hybrid: LanguageModel) -> None:
    """A mistake in the engine itself, outside what a step survives."""

    async def survive() -> None:
        engine = started(hybrid)
        engine.engine.step = lambda: 1 / 0  # type: ignore[assignment,return-value]  # the thread must end of it
        events = await read(engine.stream(request(num_samples=2)))
        assert [(event.index, event.finish_reason) for event in events] == [(0, "error"), (1, "error")]
        assert events[0].error == "the engine stopped"
        await until(lambda: not engine.running)
        with pytest.raises(RequestRefused):
            engine.stream(request(2))
        await engine.close()

    run(survive())
