"""What every request passes: its id and log line, then the gate that checks host, key and size."""

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from statespan.serving.api.errors import ApiError, api_error
from statespan.serving.api.logs import log_request
from statespan.serving.api.metrics import ServerMetrics
from statespan.serving.api.options import ServerOptions

OPEN_PATHS = frozenset({"/", "/health", "/playground/style.css", "/playground/app.js"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOG = "statespan.log"  # the key in the scope of the fields that a route adds to its request's log line


class RequestLog:
    """Gives a request its id (the client's own, where it is a sane one), times it, and logs it when it ended."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        fields: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope[LOG] = fields
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            response = api_error(error).response()  # logs what nobody foresaw
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            status = status or 499  # the client went away before there was a reply
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.request(route, status, seconds)
            log_request(fields | {"status": status, "duration_s": round(seconds, 4)})


class Gate:
    """Turns away requests for another host, without a key, or with too large or too slow a body."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options = app, options
        self._keys = [_digest(key.encode()) for key in options.api_keys]
        self._hosts = frozenset(host.lower() for host in options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers.get("host", ""))
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get("authorization", ""))
            self._check_length(headers.get("content-length"))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _check_host(self, host: str) -> None:
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self._hosts and name.lower() not in self._hosts:
            raise ApiError(403, f"this server does not answer to the host name {name[:80]!r}; see --allowed-host")

    def _check_key(self, authorization: str) -> None:
        if not self._keys:
            return
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("latin-1"))  # the bytes as they came
        # Every key is compared, each in constant time, so that time tells nothing about them.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            message = "no API key was given" if not authorization else "the API key is not valid"
            raise ApiError(
                401,
                f"{message}; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, length: str | None) -> None:
        if length is not None and length.isdecimal() and int(length[:20]) > self.options.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.options.max_body_bytes} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that counts the body's bytes and seconds."""
        size, complete = 0, False
        deadline = time.monotonic() + self.options.body_timeout_s

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time", code="body_timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.options.max_body_bytes:
                raise self._too_large()
            return message

        return limited


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
