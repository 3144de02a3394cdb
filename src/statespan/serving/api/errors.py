"""Errors as OpenAI's clients expect them: a status and {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from statespan.errors import UserError
from statespan.serving.api.json_text import dump
from statespan.serving.request import QueueFull, RequestRefused

logger = logging.getLogger("statespan.serving")

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
LONGEST = 600  # characters of a message: names of fields may be a client's own
MESSAGES = {404: "there is no such page", 405: "this page does not know that method"}


class ApiError(HTTPException):
    """A request that cannot be served, told to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = KINDS.get(self.status_code, "invalid_request_error")
        message, param = shortened(" ".join(str(self.detail).split())), self.param and shortened(self.param)
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> Response:
        """The whole reply."""
        return Response(dump(self.body()), self.status_code, self.headers, media_type="application/json")


def shortened(text: str) -> str:
    """The text with its middle left out where it is long: the end says what is wrong."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} .. {text[-half:]}"


def api_error(error: Exception) -> ApiError:
    """What the client is told of any exception; one that nobody foresaw says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, RequestRefused):
        return ApiError(422, str(error), code="context_length_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, "the server failed at this request; its log has the reason", code="internal_error")


def install(app: FastAPI) -> None:
    """Every error of a route becomes an error object."""

    async def reply(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors()).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = MESSAGES.get(
            error.status_code, str(error.detail)
        )  # routes that do not exist, bodies that are no JSON
        return ApiError(error.status_code, message, headers=error.headers).response()

    app.add_exception_handler(ApiError, reply)
    app.add_exception_handler(UserError, reply)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """One line about the first field that is wrong; where it may be one of several things, what each wants."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "value_error":  # of ours, about several fields
        return ApiError(400, str(first["msg"]).removeprefix("Value error, "), param=".".join(place) or None)
    if not place:
        return ApiError(400, "send a JSON object, with the header Content-Type: application/json", code="invalid_json")
    alternatives = [error for error in errors if [str(part) for part in error["loc"][1:2]] == place[:1]]
    if len(alternatives) > 1:
        message = "; or: ".join(dict.fromkeys(str(error["msg"]) for error in alternatives))
        levels = zip(*(error["loc"][1:] for error in alternatives), strict=False)
        where = ".".join(str(level[0]) for level in takewhile(lambda level: len(set(level)) == 1, levels))
        return ApiError(400, f"{where}: {message}", param=where, code="invalid_value")
    param = ".".join(place)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized request argument: {param}", param=param, code="unknown_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {first['msg']}", param=param, code=code)
