"""POST /v1/embeddings: texts as vectors of length 1."""

import base64
from typing import Any

from fastapi import APIRouter, Request, Response
from torch.nn.functional import normalize

from statespan.serving.api.completions import read_prompts
from statespan.serving.api.errors import ApiError
from statespan.serving.api.generation import unless_gone
from statespan.serving.api.json_text import StrictRoute, dump
from statespan.serving.api.schemas import EmbeddingsBody, EmbeddingsReply
from statespan.serving.api.service import ServiceDep

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/embeddings", response_model=EmbeddingsReply)
async def create_embeddings(body: EmbeddingsBody, http: Request, service: ServiceDep) -> Response:
    """The final state of each text: what the model would continue it from, scaled to length 1."""
    service.require(body.model)
    size = service.config.hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions: this model's vectors have {size} numbers", param="dimensions")
    prompts = await read_prompts(service, body.input)
    vectors = normalize(await unless_gone(http, service.backend.embed(prompts)), dim=-1)

    def value(index: int) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(vectors[index].numpy().astype("<f4").tobytes()).decode()
        return vectors[index].tolist()

    data = [{"object": "embedding", "index": index, "embedding": value(index)} for index in range(len(prompts))]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    reply = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return Response(dump(reply), media_type="application/json")
