"""Inbox: what other threads tell the engine: requests that come, and those that are to end."""

import threading
from collections import deque

import torch

from statespan.serving.job import Job
from statespan.serving.request import QueueFull, Request, RequestRefused


class Inbox:
    """`submit` and `cancel` are for any thread, the others for the engine's.

    Args:
        max_waiting: requests that may wait, here and in the engine's queue.
    """

    def __init__(self, max_waiting: int) -> None:
        self.num_requests = 0  # ever
        self._max_waiting = max_waiting
        self._lock = threading.RLock()  # a stream may be collected, and cancel, while this thread holds it
        self._arrived: deque[Job] = deque()
        self._cancelled: set[str] = set()
        self._ids: set[str] = set()  # requests that have not ended
        self._closed = False

    def __len__(self) -> int:
        """Requests that have arrived since `take`."""
        return len(self._arrived)

    def submit(self, request: Request, num_queued: int) -> None:
        """Take a request, beside so many that wait in the engine's queue.

        Raises:
            RequestRefused: its id is in use, or the inbox is closed.
            QueueFull: as many wait as may.
        """
        seed = request.options.seed
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        with self._lock:
            if self._closed:
                raise RequestRefused("the engine is closed")
            if request.id in self._ids:
                raise RequestRefused(f"request id {request.id!r} is in use; give each request its own")
            if len(self._arrived) + num_queued >= self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already; try again later")
            self.num_requests += 1
            self._ids.add(request.id)
            self._arrived.append(Job(request, self.num_requests, seed))

    def cancel(self, request_id: str) -> None:
        """End a request, if it has not ended."""
        with self._lock:
            if request_id in self._ids:
                self._cancelled.add(request_id)

    def take(self) -> tuple[list[Job], set[str]]:
        """The jobs that have arrived, and the ids of requests to be ended."""
        with self._lock:
            arrived = [self._arrived.popleft() for _ in range(len(self._arrived))]
            cancelled, self._cancelled = self._cancelled, set()
        return arrived, cancelled

    def ended(self, request_id: str) -> None:
        """The id is free again."""
        with self._lock:
            self._ids.discard(request_id)
            self._cancelled.discard(request_id)

    def close(self) -> bool:
        """Take no more, and forget what has arrived; False where it was closed."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._arrived.clear()
            return True

    def check(self, running: list[Job]) -> None:
        """Raise AssertionError unless the requests that have not ended are these and those that have just arrived."""
        jobs = [*self._arrived, *running]
        assert {job.request.id for job in jobs} == self._ids and len(jobs) == len(self._ids)
