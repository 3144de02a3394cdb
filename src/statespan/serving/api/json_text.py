"""JSON in and out: strict in what it reads, pure ASCII in what it writes."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


def dump(value: Any) -> bytes:
    """JSON of `value`. Escapes everything beyond ASCII, so that text no UTF-8 can hold does no harm."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


class StrictRequest(Request):
    """A request whose JSON has no NaN, no lone surrogates and bounded depth."""

    async def json(self) -> Any:
        """The body's value; ValueError, which becomes a 400, where it is no such JSON."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictRoute(APIRoute):
    """A route that reads its body as StrictRequest does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle
