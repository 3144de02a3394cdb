"""The FastAPI app of one Service."""

import contextlib
from collections.abc import AsyncGenerator

from fastapi import FastAPI

from statespan import __version__
from statespan.serving.api import chat, completions, embeddings, errors, pages, playground, status
from statespan.serving.api.middleware import Gate, RequestLog
from statespan.serving.api.schemas import ErrorReply
from statespan.serving.api.service import Service

ROUTERS = (completions.router, chat.router, embeddings.router, status.router, pages.router, playground.router)
ERRORS = {
    400: "a request that cannot be understood or is not supported",
    401: "no API key, or a wrong one",
    403: "another host name",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    422: "more tokens or sequences than the server gives",
    429: "too many requests wait",
    500: "the server failed",
    503: "the server starts or shuts down",
}


def create_app(service: Service) -> FastAPI:
    """The app. It starts the service's backend when it starts, and closes it when it ends.

    Args:
        service: model and limits.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        await service.backend.start()
        try:
            yield
        finally:
            await service.backend.close()

    app = FastAPI(
        title="Statespan",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        responses={code: {"model": ErrorReply, "description": text} for code, text in ERRORS.items()},
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_middleware(Gate, options=service.options)
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app
