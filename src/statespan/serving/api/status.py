"""What is served and how it goes: /v1/models, /health, /metrics."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from statespan.serving.api.errors import ApiError
from statespan.serving.api.json_text import dump
from statespan.serving.api.service import Service, ServiceDep

router = APIRouter()


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """The one model of this server."""
    return {"object": "list", "data": [_card(service)]}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, service: ServiceDep) -> dict[str, Any]:
    """The model, if this is its name."""
    if model != service.options.name:
        raise ApiError(404, f"there is no model {model[:80]!r} here", param="model", code="model_not_found")
    return _card(service)


@router.get("/health", responses={503: {"description": "not ready"}})
async def health(service: ServiceDep) -> Response:
    """200 when requests are served; 503 while the server starts or shuts down."""
    state = "ready" if service.ready else "shutting down" if service.draining else "not ready"
    return Response(dump({"status": state}), 200 if service.ready else 503, media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus' text format."""
    text = service.metrics.text(await service.backend.metrics())
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _card(service: Service) -> dict[str, Any]:
    return {"id": service.options.name, "object": "model", "created": service.created, "owned_by": "statespan"}
