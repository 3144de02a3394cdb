"""From the body of an HTTP request to requests of the engine."""

import json
from collections.abc import Sequence

from statespan.generation.options import GenerationOptions
from statespan.serving.api.errors import ApiError
from statespan.serving.api.schemas import ChatBody, NamedTool, ResponseFormat, SamplingBody
from statespan.serving.api.service import Service
from statespan.serving.backend import Grammar
from statespan.serving.request import Request
from statespan.serving.tool_calls import CallFormat, markers_of


def engine_requests(
    service: Service,
    body: SamplingBody,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
    logprobs: bool | int,
    ids: Sequence[str],
    num_samples: int | None = None,
) -> list[Request]:
    """One request a prompt, with these ids and n samples; the samples of all prompts count up from the seed.

    Raises:
        ApiError: more tokens or sequences than the server gives.
    """
    limits, num_samples = service.options, num_samples or body.n or 1
    if max_tokens > limits.max_new_tokens:
        raise ApiError(
            422,
            f"max_tokens is {max_tokens}; this server gives {limits.max_new_tokens}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if len(prompts) * num_samples > limits.max_sequences:
        raise ApiError(
            422,
            f"{len(prompts)} prompts times n = {num_samples} are too many; this server takes {limits.max_sequences}",
            param="n",
            code="too_many_sequences",
        )
    bias = _logit_bias(service, body)
    return [
        Request(
            prompt,
            _options(body, max_tokens, logprobs, place * num_samples),
            id=request_id,
            priority=body.priority or 0,
            deadline_s=body.deadline_s,
            num_samples=num_samples,
            logit_bias=bias,
        )
        for place, (prompt, request_id) in enumerate(zip(prompts, ids, strict=True))
    ]


def _options(body: SamplingBody, max_tokens: int, logprobs: bool | int, place: int) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        stop=stop_strings(body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        seed=None if body.seed is None else _wrapped(body.seed + place),
        logprobs=logprobs,
    )


def stop_strings(body: SamplingBody) -> tuple[str, ...]:
    """`stop` as a tuple."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _wrapped(seed: int) -> int:
    """`seed` in 63 bits, so that the seeds of samples, which count up, stay below 64."""
    return seed % 2**63


def _logit_bias(service: Service, body: SamplingBody) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < service.config.vocab_size):
            raise ApiError(400, f"logit_bias: {key[:40]!r} is no token id of this model", param="logit_bias")
        bias[int(key)] = value
    return bias


def grammar_of_calls(service: Service, body: ChatBody) -> Grammar:
    """What a reply must be that has to call a function."""
    markers = None if service.template is None else markers_of(service.template.tool_source)
    if markers is None:
        raise ApiError(
            400,
            "the chat template writes calls in no form that is known here, so they cannot be required",
            param="tool_choice",
        )
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    functions = [tool.function for tool in body.tools or [] if named in (None, tool.function.name)]
    schemas = ({"type": "object"} if f.parameters is None else f.parameters for f in functions)
    pairs = zip(functions, schemas, strict=True)
    several = named is None and body.parallel_tool_calls is not False
    return Grammar("tool_calls", calls=CallFormat(markers, tuple((f.name, json.dumps(s)) for f, s in pairs), several))


def grammar_of(response_format: ResponseFormat | None) -> Grammar | None:
    """What response_format asks for, or None where any text will do."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return Grammar("json_object")
    return Grammar("json_schema", json.dumps(response_format.json_schema.schema_))
