"""Generation: the events of all sequences of one HTTP request, counted, timed and collected."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from statespan.generation.batch import TokenLogprob
from statespan.serving.api.errors import ApiError
from statespan.serving.api.middleware import LOG
from statespan.serving.api.service import Service
from statespan.serving.backend import Events, Grammar
from statespan.serving.request import Event, FinishReason, Request

T = TypeVar("T")

REASONS: dict[FinishReason, str] = {"eos": "stop"}  # what OpenAI calls it; others have the same name


@dataclass
class Choice:
    """One choice of the reply, whole."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    text: str = ""
    finish_reason: str = "length"


class Generation:
    """Iterating gives (choice, event) as they come; choices are numbered prompt by prompt.

    Closing it, or an error, cancels what still runs.
    """

    def __init__(
        self,
        service: Service,
        requests: Sequence[Request],
        streams: Sequence[Events],
        log: dict[str, Any],
        *,
        constrained: bool,
    ) -> None:
        self._service, self._requests, self._streams, self._log = service, requests, streams, log
        self._constrained = constrained
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}  # when each choice's newest token came
        self._counts = [0] * (len(requests) * requests[0].num_samples)
        self._cached = [0] * len(requests)
        self._reasons: dict[int, str] = {}
        if service.options.log_text and service.tokenizer is not None:
            log["prompts"] = [service.tokenizer.decode(list(request.prompt)) for request in requests]
            log["replies"] = [""] * len(self._counts)

    @classmethod
    async def open(
        cls,
        service: Service,
        http: HttpRequest,
        requests: Sequence[Request],
        *,
        grammar: Grammar | None = None,
        session: str | None = None,
    ) -> "Generation":
        """Submit all requests, or none where one is refused."""
        streams: list[Events] = []
        try:
            for request in requests:
                streams.append(await service.backend.stream(request, grammar=grammar, session=session))
        except BaseException:
            await _close(streams)
            raise
        return cls(service, requests, streams, http.scope[LOG], constrained=grammar is not None)

    @property
    def num_choices(self) -> int:
        """Prompts times samples."""
        return len(self._counts)

    def prompt(self, choice: int) -> list[int]:
        """The token ids of a choice's prompt."""
        return list(self._requests[choice // self._requests[0].num_samples].prompt)

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, of what came so far."""
        prompt, completion = sum(len(request.prompt) for request in self._requests), sum(self._counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The events, until each choice has ended.

        Raises:
            ApiError: a sequence failed, or the server is shutting down.
        """
        queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(place, stream, queue)) for place, stream in enumerate(self._streams)]
        running = len(tasks)
        try:
            while running:
                if (item := await queue.get()) is None:
                    running -= 1
                    continue
                place, event = item
                choice = place * self._requests[place].num_samples + event.index
                self._note(place, choice, event)
                yield choice, event
            for task in tasks:
                task.result()  # raises what ended a stream before its time
            self._finish()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _close(self._streams)
            self._log |= {key: value for key, value in self.usage().items() if isinstance(value, int)}
            self._log |= {"cached_tokens": sum(self._cached), "finish_reasons": list(self._reasons.values())}

    async def collect(self) -> list[Choice]:
        """All choices, whole."""
        sequences = [Choice() for _ in self._counts]
        async for choice, event in self.events():
            sequence = sequences[choice]
            sequence.token_ids += event.token_ids
            sequence.logprobs += event.logprobs
            sequence.text += event.text
            if event.finish_reason is not None:
                sequence.finish_reason = reason_of(event.finish_reason)
        return sequences

    def _note(self, place: int, choice: int, event: Event) -> None:
        if event.finish_reason == "error":
            message = event.error or "the generation failed"
            by_client = self._constrained and "grammar" in message  # a schema that leads nowhere
            raise ApiError(400 if by_client else 500, message, code="generation_failed")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down; send the request again", code="shutting_down")
        now, metrics = time.perf_counter(), self._service.metrics
        for _ in event.token_ids:
            if choice in self._last:
                metrics.next_token(now - self._last[choice])
            else:
                metrics.first_token(now - self._start)
            self._last[choice] = now
        self._counts[choice] += len(event.token_ids)
        if "replies" in self._log:
            self._log["replies"][choice] += event.text
        if event.usage is not None:
            self._cached[place] = event.usage.cached_tokens
        if event.finish_reason is not None:
            self._reasons[choice] = event.finish_reason

    def _finish(self) -> None:
        for choice, count in enumerate(self._counts):
            request = self._requests[choice // self._requests[0].num_samples]
            self._service.metrics.reply(len(request.prompt), count)


def reason_of(reason: FinishReason) -> str:
    """A finish reason as OpenAI names it; "deadline" is ours, and only requests with deadline_s see it."""
    return REASONS.get(reason, reason)


async def _pump(place: int, stream: Events, queue: "asyncio.Queue[tuple[int, Event] | None]") -> None:
    try:
        async for event in stream:
            queue.put_nowait((place, event))
    finally:
        queue.put_nowait(None)


async def _close(streams: Sequence[Events]) -> None:
    for stream in streams:
        await stream.aclose()


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client goes away.

    Raises:
        ApiError: the client went away; nobody reads this.
    """
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
