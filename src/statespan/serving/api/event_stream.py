"""Server-sent events: each value a line of JSON, [DONE] at the end; the source is closed when the client goes away."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from statespan.serving.api.errors import api_error
from statespan.serving.api.json_text import dump

Chunks = AsyncGenerator[dict[str, Any], None]


class EventStream(Response):
    """A reply that comes in pieces. While there are none, a comment now and then keeps proxies from giving up.

    Args:
        source: the values. Whatever it raises is sent as an error object, and nothing after it.
        keep_alive_s: between two comments.
    """

    media_type = "text/event-stream"

    def __init__(self, source: Chunks, keep_alive_s: float) -> None:
        self.source, self.keep_alive_s = source, keep_alive_s
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = [asyncio.create_task(self._send_all(send)), asyncio.create_task(self._watch(receive, send))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.source.aclose()
        for task in done:
            task.result()

    async def _send_all(self, send: Send) -> None:
        async def line(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

        try:
            async for value in self.source:
                await line(dump(value))
        except OSError:  # the client went away
            raise
        except Exception as error:
            await line(dump(api_error(error).body()), more=False)
            return
        await line(b"[DONE]", more=False)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Returns when the client went away."""
        while True:
            try:
                message = await asyncio.wait_for(receive(), self.keep_alive_s)
            except TimeoutError:
                await send({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})
                continue
            if message["type"] == "http.disconnect":
                return
