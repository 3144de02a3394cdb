"""AsyncEngine: an engine on a thread of its own, and its events as asynchronous streams."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from torch import Tensor

from statespan.serving.engine import Engine
from statespan.serving.request import Event, Request, RequestRefused

T = TypeVar("T")

_CANCEL_S = 10.0  # after this a close no longer waits for cancelled requests to leave


class AsyncEngine:
    """Owns the thread in which the engine steps. All methods but `start` are for coroutines of any event loop.

    Example:
        >>> import asyncio, statespan
        >>> from statespan.serving.engine import Engine, EngineOptions
        >>> from statespan.serving.request import GenerationOptions, Request
        >>> async def count_tokens() -> int:
        ...     engine = AsyncEngine(Engine(statespan.build("jamba-tiny", seed=0), EngineOptions(num_pages=16)))
        ...     engine.start()
        ...     request = Request((1, 2, 3), GenerationOptions(max_new_tokens=4, temperature=0))
        ...     ids = [i for event in [e async for e in engine.stream(request)] for i in event.token_ids]
        ...     await engine.close()
        ...     return len(ids)
        >>> asyncio.run(count_tokens())
        4
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = threading.Condition()
        self._inboxes: dict[str, _Inbox] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._refusing = self._stopping = False

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="statespan-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether requests are accepted and served."""
        return self._thread is not None and self._thread.is_alive() and not self._refusing

    def stream(self, request: Request) -> "RequestStream":
        """The events of a request, which is submitted at once; must be called in an event loop.

        The request is cancelled when the iterator is closed or dropped before its last event.

        Raises:
            RequestRefused: the engine can never serve it, its id is in use, or the engine is shutting down.
            QueueFull: too many wait.
        """
        if not self.running:
            raise RequestRefused("the engine is not running; it is starting or shutting down")
        if request.id in self._inboxes:
            raise RequestRefused(f"request id {request.id!r} is in use")
        inbox = self._inboxes[request.id] = _Inbox(request.num_samples)
        try:
            self.engine.submit(request)
        except BaseException:
            del self._inboxes[request.id]
            raise
        self._notify()
        return RequestStream(request, inbox.events, self._cancel)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """[n h] float32: the final norm's output at the last token of each prompt."""
        return await self.call(lambda: self.engine.embed(prompts))

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, run on the engine's thread between two steps: it has the model to itself."""
        if not self.running:
            raise RequestRefused("the engine is not running; it is starting or shutting down")
        future: Future[T] = Future()
        self._calls.append((function, future))
        self._notify()
        return await asyncio.wrap_future(future)

    async def close(self, *, drain_s: float = 0) -> None:
        """Refuse new requests, let the accepted ones go on for `drain_s`, cancel what is left and end the thread."""
        self._refusing = True
        await self._until_empty(drain_s)
        for request_id in list(self._inboxes):
            self._cancel(request_id)
        await self._until_empty(_CANCEL_S)
        self._stopping = True
        self._notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._thread = None
        self.engine.close()

    async def _until_empty(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while self._inboxes and time.monotonic() < end_s:
            await asyncio.sleep(0.01)

    def _cancel(self, request_id: str) -> None:
        if request_id in self._inboxes:
            self.engine.cancel(request_id)
            self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _run(self) -> None:
        """The thread: steps while there is work, sleeps while there is none."""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._stopping or self._calls or not self.engine.idle)
                if self._stopping:
                    return
                while self._calls:
                    _answer(*self._calls.popleft())
                self._deliver(self.engine.step())
        finally:  # also where the engine itself is broken: nobody waits for ever
            self._refusing = True
            error = "the engine stopped"
            ends = [(name, index) for name, inbox in list(self._inboxes.items()) for index in list(inbox.open)]
            self._deliver([Event(name, index, (), "", (), "error", error=error) for name, index in ends])
            for _, future in self._calls:
                future.set_exception(RequestRefused(error))

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hand events to their streams: one call a step and event loop, however many there are."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Inbox, Event]]] = {}
        for event in events:
            inbox = self._inboxes.get(event.request_id)
            if inbox is None:
                continue
            batches.setdefault(inbox.loop, []).append((inbox, event))
            if event.finish_reason is not None:
                inbox.open.discard(event.index)
                if not inbox.open:
                    del self._inboxes[event.request_id]
        for loop, batch in batches.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put, batch)


class RequestStream(AsyncIterator[Event]):
    """The events of one request, in the order in which they came."""

    def __init__(self, request: Request, events: "asyncio.Queue[Event]", cancel: Callable[[str], None]) -> None:
        self.request = request
        self._events, self._cancel = events, cancel
        self._open = request.num_samples  # samples whose last event was not read

    async def __anext__(self) -> Event:
        if self._open == 0:
            raise StopAsyncIteration
        event = await self._events.get()
        self._open -= event.finish_reason is not None
        return event

    async def aclose(self) -> None:
        """Read no more; cancels the request if it goes on."""
        self.__del__()

    def __del__(self) -> None:
        if self._open:
            self._open = 0
            self._cancel(self.request.id)


class _Inbox:
    """Where the engine's thread leaves the events of a request. It does not hold the stream, which may be dropped."""

    def __init__(self, num_samples: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.open = set(range(num_samples))  # samples whose last event has not come


def _put(batch: Sequence[tuple[_Inbox, Event]]) -> None:
    for inbox, event in batch:
        inbox.events.put_nowait(event)


def _answer(call: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)
