"""What the playground asks besides OpenAI's endpoints: what the model costs, and what it does with each token."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from statespan.inspection.tokens import token_texts
from statespan.models.accounting import kv_bytes_per_token, state_bytes, transformer_like
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.api.errors import ApiError
from statespan.serving.api.json_text import StrictRoute, dump
from statespan.serving.api.schemas import Body, Token
from statespan.serving.api.service import Service, ServiceDep

MOST_TOKENS = 4096  # of a token view: it is one forward, during which no other request goes on

router = APIRouter(route_class=StrictRoute, prefix="/playground")


class TokensBody(Body):
    """POST /playground/tokens."""

    ids: Annotated[list[Token], Field(min_length=1)]
    layer: Annotated[int, Field(ge=0, le=65535)]


class TokensReply(BaseModel):
    """One entry a token, null where there is none."""

    texts: list[str]  # what each token adds to the text; "" until a character is complete
    dt: list[float | None] | None  # mean step size of the layer; null: it has none
    experts: list[list[int]] | None  # the router's choices; null: it has none
    logprobs: list[float | None]  # nats


class ModelReply(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str


@router.get("/model", response_model=ModelReply)
async def model_facts(service: ServiceDep) -> dict[str, Any]:
    """The model's layers, and the bytes that a sequence takes: a constant state, and keys and values for each token."""
    config, value_bytes = service.config, 2 if service.model is None else service.model.dtype.itemsize
    transformer = transformer_like(config)
    return {
        "name": service.options.name,
        "chat": service.template is not None,
        "text": service.tokenizer is not None,
        "layers": [_layer(index, spec) for index, spec in enumerate(config.layers)],
        "num_experts": config.moe.num_experts,
        "eos_token_ids": sorted({*config.eos_token_ids, *(service.tokenizer.eos_ids if service.tokenizer else ())}),
        "max_new_tokens": service.options.max_new_tokens,
        "state_bytes": state_bytes(config, value_bytes),
        "kv_bytes_per_token": kv_bytes_per_token(config, value_bytes),
        "transformer_bytes_per_token": kv_bytes_per_token(transformer, value_bytes),
        "window": transformer.attention.sliding_window,  # tokens after which keys and values grow no further
    }


@router.post("/tokens", response_model=TokensReply)
async def tokens(body: TokensBody, service: ServiceDep) -> Response:
    """What one layer does with each token of a text: step size, experts, log-probability."""
    if len(body.ids) > MOST_TOKENS:
        message = f"ids has {len(body.ids)} tokens; a token view takes {MOST_TOKENS}"
        raise ApiError(422, message, param="ids", code="context_length_exceeded")
    ids = service.checked(body.ids, param="ids")
    service.require(service.options.name)
    view = await service.backend.token_view(ids, body.layer)
    reply = {
        "texts": _texts(service, ids),
        "dt": None if view.dt is None else [value if math.isfinite(value) else None for value in view.dt],
        "experts": view.experts,
        "logprobs": view.logprobs,
    }
    return Response(dump(reply), media_type="application/json")


def _layer(index: int, spec: LayerSpec) -> dict[str, Any]:
    return {
        "index": index,
        "kind": str(spec),
        "dt": spec.mixer in ("mamba1", "mamba2"),
        "experts": spec.feed_forward == "moe",
    }


def _texts(service: Service, ids: Sequence[int]) -> list[str]:
    return [f"<{i}>" for i in ids] if service.tokenizer is None else token_texts(service.tokenizer, ids)
