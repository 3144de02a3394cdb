"""ReplicaEvents: one request's events, repeated by another replica from where a dead one broke off."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from statespan.errors import UserError, first_line
from statespan.serving.backend import Grammar
from statespan.serving.request import Event, FinishReason, QueueFull, Request, RequestRefused

ATTEMPTS = 6  # at one request, each with a replica that lives
WAIT_S = 0.25  # before the second attempt; twice as long before each next one

logger = logging.getLogger("statespan.serving")


class Submits(Protocol):
    """The replicas, as a request sees them."""

    @property
    def closing(self) -> bool:
        """Whether the server shuts down."""
        ...

    def submit(self, request: Request, grammar: Grammar | None, session: str) -> Any:
        """An asynchronous generator of what the session's replica gives."""
        ...

    def forget(self, events: "ReplicaEvents") -> None:
        """These events are read, or closed."""
        ...


@dataclass(frozen=True)
class Refused:
    """A request that a replica's engine refuses; the error itself may not survive the way here."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: UserError) -> "Refused":
        kind = next((kind.__name__ for kind in (QueueFull, RequestRefused) if isinstance(error, kind)), "UserError")
        return cls(kind, str(error))

    def error(self) -> UserError:
        """The exception to raise here."""
        return {"QueueFull": QueueFull, "RequestRefused": RequestRefused}.get(self.kind, UserError)(self.message)


class ReplicaEvents:
    """The events of one request, wherever it runs; after the death of a replica another one goes on."""

    def __init__(self, backend: Submits, request: Request, grammar: Grammar | None, session: str) -> None:
        self._backend, self._request, self._grammar, self._session = backend, request, grammar, session
        self._source: Any = None
        self._attempts = 0
        self._waiting: deque[Event] = deque()
        self._sent = [_Sent() for _ in range(request.num_samples)]
        self._skip = [_Skip((), 0) for _ in self._sent]
        self._open = set(range(request.num_samples))

    async def open(self) -> None:
        """Submit the request, to another replica where one dies meanwhile.

        Raises:
            UserError: it is refused.
        """
        while True:
            # A replica that only seemed dead may still have it under its old name.
            request = replace(self._request, id=f"{self._request.id}-{self._attempts}")
            self._source = self._backend.submit(request, self._grammar, self._session)
            try:
                answer = await anext(self._source)
            except Exception as error:
                await self._lost(error)
                continue
            if isinstance(answer, Refused):
                raise answer.error()
            self._skip = [_Skip(tuple(sent.token_ids), sent.text_size) for sent in self._sent]
            return

    async def _lost(self, error: Exception) -> None:
        """Wait before the next attempt; raises where there is none."""
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError
        from ray.serve.exceptions import RayServeException

        lost = isinstance(error, RayError | RayServeException) and not isinstance(
            error, RayTaskError | TaskCancelledError
        )
        self._attempts += 1
        if not lost or self._attempts >= ATTEMPTS or self._backend.closing:
            raise RequestRefused(f"no replica could take the request: {first_line(error)}") from error
        fields = {"reply": self._request.id, "attempt": self._attempts, "reason": first_line(error)}
        logger.warning("a replica was lost; another one repeats its reply", extra={"fields": fields})
        await asyncio.sleep(WAIT_S * 2 ** (self._attempts - 1))

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            if not self._open:
                self._backend.forget(self)
                raise StopAsyncIteration
            await self._read()
        return self._waiting.popleft()

    async def _read(self) -> None:
        """The next events of the replica, or of another one."""
        try:
            events = cast(list[Event], await anext(self._source))
        except StopAsyncIteration:
            self._end("error", "the replica ended the reply before its time")
        except Exception as error:
            try:
                await self._lost(error)
                await self.open()
            except UserError as refused:
                self._end("error", str(refused))
        else:
            for event in events:
                self._take(event)

    def _take(self, event: Event) -> None:
        """Hand on what of an event is new, after a repetition."""
        if event.index not in self._open:
            return
        event, skip = self._skip[event.index].rest(event)
        if skip.differs:
            self._end("error", "a replica was lost, and another one could not repeat its reply")
            return
        sent, self._skip[event.index] = self._sent[event.index], skip
        sent.token_ids += event.token_ids
        sent.text_size += len(event.text)
        if event.token_ids or event.text or event.finish_reason is not None:
            self._waiting.append(event)
        if event.finish_reason is not None:
            self._open.discard(event.index)

    def _end(self, reason: FinishReason, error: str | None = None) -> None:
        """The samples that go on end here."""
        self._waiting += [Event(self._request.id, i, (), "", (), reason, error=error) for i in sorted(self._open)]
        self._open.clear()
        self._cancel()

    def end(self) -> None:
        """The server shuts down: what is not there yet does not come."""
        self._end("cancelled")

    def _cancel(self) -> None:
        with contextlib.suppress(Exception):  # the replica may be gone
            self._source.cancel()

    async def aclose(self) -> None:
        """Read no more; cancels the request if it goes on."""
        if self._open:
            self._open.clear()
            self._cancel()
        self._backend.forget(self)


@dataclass
class _Sent:
    """What clients have of a sample."""

    token_ids: list[int] = field(default_factory=list[int])
    text_size: int = 0


@dataclass(frozen=True)
class _Skip:
    """What of a repeated sample is known: its next tokens, and so many characters."""

    token_ids: tuple[int, ...]
    text_size: int
    differs: bool = False  # the repetition is another text

    def rest(self, event: Event) -> "tuple[Event, _Skip]":
        """What of an event is new, and what is known of the next ones."""
        count, size = min(len(self.token_ids), len(event.token_ids)), min(self.text_size, len(event.text))
        differs = self.token_ids[:count] != event.token_ids[:count] or (
            event.finish_reason is not None and (count < len(self.token_ids) or size < self.text_size)
        )
        new = replace(event, token_ids=event.token_ids[count:], text=event.text[size:], logprobs=event.logprobs[count:])
        return new, _Skip(self.token_ids[count:], self.text_size - size, differs)
