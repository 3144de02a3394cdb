"""Logs as JSON lines: one a request, with its id, sizes and times; no text of prompts or replies unless asked for."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

logger = logging.getLogger("statespan.serving")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what is passed as `extra={"fields": {...}}` becomes fields of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def configure(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send our log and the HTTP library's to `stream` (stderr) as JSON lines; for a process that only serves."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("statespan", "uvicorn", "ray"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.setLevel(level)
        log.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def announce(url: str, name: str, warnings: Sequence[str]) -> None:
    """The server begins: where it is, and what its operator should know."""
    for warning in warnings:
        logger.warning(warning)
    logger.info(f"serving {name} at {url}", extra={"fields": {"url": url, "model": name}})


def log_request(fields: dict[str, Any]) -> None:
    """One line about a request that ended."""
    logger.info("request", extra={"fields": fields})
