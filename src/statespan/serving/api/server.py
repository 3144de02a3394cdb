"""uvicorn with a drain: at SIGTERM new requests are turned away and those that run may end."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from statespan.errors import UserError
from statespan.serving.api import logs
from statespan.serving.api.app import create_app
from statespan.serving.api.service import Service

logger = logging.getLogger("statespan.serving")
MOST_PORT = 65535


class DrainingServer(uvicorn.Server):
    """Waits for the replies that run before it closes connections; meanwhile /health says 503."""

    def __init__(self, config: uvicorn.Config, service: Service, warnings: Sequence[str] = ()) -> None:
        super().__init__(config)
        self.service, self.warnings = service, warnings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if threading.current_thread() is threading.main_thread():
            for name in HANDLED_SIGNALS:  # once more: Ray, which has started meanwhile, takes them and aborts
                signal.signal(name, self.handle_exit)
        for sock in sockets or []:
            host, port = sock.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            logs.announce(url, self.service.options.name, self.warnings)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        logger.info("draining", extra={"fields": {"drain_s": self.service.options.drain_s}})
        drain = asyncio.ensure_future(self.service.backend.close(drain_s=self.service.options.drain_s))
        while not (drain.done() or self.force_exit):  # a second Ctrl-C
            await asyncio.wait({drain}, timeout=0.1)
        drain.cancel()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the first address of `host`; port 0 takes a free one.

    Raises:
        UserError: no such port; the address is in use or not this machine's.
    """
    if not 0 <= port <= MOST_PORT:  # the system would take it modulo 65,536
        raise UserError(f"{port} is no port; choose a --port from 1 to {MOST_PORT}, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)  # asyncio sends small pieces at once only where TCP is named
    except OSError as error:
        raise UserError(f"{host} is no address to listen at: {error.strerror}") from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen at {host} port {port}: {error.strerror}; choose another --port") from None
    return sock


def configure(service: Service, *, tls: tuple[Path, Path] | None = None) -> uvicorn.Config:
    """uvicorn's settings for a service.

    Raises:
        UserError: the certificate or key of `tls` cannot be used.
    """
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,  # after the drain: what is left is idle connections
        ssl_certfile=tls and str(tls[0]),
        ssl_keyfile=tls and str(tls[1]),
    )
    try:
        config.load()
    except OSError as error:
        raise UserError(
            f"the TLS certificate {tls and tls[0]} or its key cannot be used: {error.strerror or error}"
        ) from None
    return config


def serve(
    service: Service, sock: socket.socket, *, tls: tuple[Path, Path] | None = None, warnings: Sequence[str] = ()
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        service: model and limits.
        sock: from `bind`.
        tls: files of the certificate chain and its key.
        warnings: for the log.
    """
    config = configure(service, tls=tls)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # uvicorn raises it again when all is done: the process shall end well
    DrainingServer(config, service, warnings).run(sockets=[sock])
