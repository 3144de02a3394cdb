"""POST /v1/completions: texts or token ids, continued."""

import contextlib
import hashlib
import time
import uuid
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from fastapi import APIRouter, Request, Response

from statespan.errors import UserError
from statespan.serving.api.errors import ApiError
from statespan.serving.api.event_stream import Chunks, EventStream
from statespan.serving.api.generation import Choice, Generation, reason_of, unless_gone
from statespan.serving.api.json_text import StrictRoute, dump
from statespan.serving.api.requests import engine_requests, grammar_of
from statespan.serving.api.schemas import CompletionBody, CompletionReply
from statespan.serving.api.service import Service, ServiceDep

DEFAULT_MAX_TOKENS = 16  # OpenAI's
SESSION_TOKENS = 128  # that a prompt without a session is known by

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", response_model=CompletionReply)
async def create_completion(body: CompletionBody, http: Request, service: ServiceDep) -> Response:
    """Continue one or several prompts."""
    service.require(body.model)
    prompts = await read_prompts(service, body.prompt)
    ranked = body.num_samples > (body.n or 1)
    logprobs = ranked if body.logprobs is None else (body.logprobs or True)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    reply_id = f"cmpl-{uuid.uuid4().hex}"
    ids = [f"{reply_id}-{place}" for place in range(len(prompts))]
    requests = engine_requests(
        service, body, prompts, max_tokens=max_tokens, logprobs=logprobs, ids=ids, num_samples=body.num_samples
    )
    session = http.headers.get("x-session-id") or session_of(prompts[0])
    generation = await Generation.open(
        service, http, requests, grammar=grammar_of(body.response_format), session=session
    )
    head = {"id": reply_id, "object": "text_completion", "created": int(time.time()), "model": body.model}
    if body.stream:
        return EventStream(_chunks(service, body, generation, head), service.options.keep_alive_s)

    async def whole() -> dict[str, Any]:
        samples, count = await generation.collect(), body.num_samples
        kept = [
            (prompt, sample)
            for place, prompt in enumerate(prompts)
            for sample in _likeliest(samples[place * count : (place + 1) * count], body.n or 1)
        ]
        choices = [await _choice(service, body, index, *one) for index, one in enumerate(kept)]
        return head | {"choices": choices, "usage": generation.usage()}

    return Response(dump(await unless_gone(http, whole())), media_type="application/json")


async def read_prompts(service: Service, prompt: Any) -> list[tuple[int, ...]]:
    """The prompts of a body as token ids; `prompt` is a text, a list of ids, or a list of either."""
    if isinstance(prompt, str):
        return [await service.encode(prompt)]
    if isinstance(prompt[0], int):
        return [service.checked(prompt)]
    if len(prompt) > service.options.max_sequences:
        raise ApiError(
            422,
            f"{len(prompt)} prompts are too many; this server takes {service.options.max_sequences}",
            param="prompt",
            code="too_many_sequences",
        )
    return [await service.encode(part) if isinstance(part, str) else service.checked(part) for part in prompt]


def session_of(prompt: tuple[int, ...]) -> str:
    """Which replica a request without a session goes to: prompts that begin alike meet again."""
    return digest(*prompt[:SESSION_TOKENS])


def digest(*parts: object) -> str:
    """A short name for a beginning, the same in every process."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _likeliest(samples: Sequence[Choice], count: int) -> Sequence[Choice]:
    """So many samples, those with the highest log-probability a token first where there are more."""
    if len(samples) == count:
        return samples
    return sorted(samples, key=lambda sample: -fmean([one.logprob for one in sample.logprobs] or [0.0]))[:count]


async def _choice(
    service: Service, body: CompletionBody, index: int, prompt: tuple[int, ...], sequence: Choice
) -> dict[str, Any]:
    text, logprobs = sequence.text, None
    if body.echo:
        text = _echoed(service, body, prompt) + text
    if body.logprobs is not None:
        scores = await service.backend.score(prompt, body.logprobs) if body.echo else []
        ids = [*prompt, *sequence.token_ids] if body.echo else sequence.token_ids
        logprobs = service.token_text.completion(ids, [*scores, *sequence.logprobs])
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": sequence.finish_reason}
    with_ids = {"token_ids": sequence.token_ids, "prompt_token_ids": prompt} if body.return_token_ids else {}
    return choice | with_ids


def _echoed(service: Service, body: CompletionBody, prompt: tuple[int, ...]) -> str:
    if isinstance(body.prompt, str):
        return body.prompt
    if service.tokenizer is None:
        raise UserError("echo needs a tokenizer, which this model lacks")
    return service.tokenizer.decode(list(prompt))


async def _chunks(service: Service, body: CompletionBody, generation: Generation, head: dict[str, Any]) -> Chunks:
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = head | {"usage": None} if with_usage else head
    offsets, begun = [0] * generation.num_choices, set[int]()
    for index in range(generation.num_choices if body.echo else 0):
        prompt = tuple(generation.prompt(index))
        text, logprobs = _echoed(service, body, prompt), None
        if body.logprobs is not None:
            logprobs = service.token_text.completion(prompt, await service.backend.score(prompt, body.logprobs))
        offsets[index] = len(text)
        yield head | {"choices": [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}]}
    async with contextlib.aclosing(generation.events()) as events:
        async for index, event in events:
            if not (event.text or event.finish_reason or event.logprobs or body.return_token_ids):
                continue
            logprobs = None
            if event.logprobs:
                logprobs = service.token_text.completion(event.token_ids, event.logprobs, offsets[index])
            offsets[index] += len(event.text)
            reason = None if event.finish_reason is None else reason_of(event.finish_reason)
            choice = {"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": reason}
            if body.return_token_ids:
                choice |= {"token_ids": event.token_ids}
                choice |= {} if index in begun else {"prompt_token_ids": generation.prompt(index)}
                begun.add(index)
            yield head | {"choices": [choice]}
    if with_usage:
        yield head | {"choices": [], "usage": generation.usage()}
