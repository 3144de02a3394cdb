"""POST /v1/chat/completions: messages through the checkpoint's chat template, and a message back."""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from statespan.checkpoints.tokenizer import FileTokenizer
from statespan.serving.api.completions import digest
from statespan.serving.api.errors import ApiError
from statespan.serving.api.event_stream import Chunks, EventStream
from statespan.serving.api.generation import Generation, reason_of, unless_gone
from statespan.serving.api.json_text import StrictRoute, dump
from statespan.serving.api.requests import engine_requests, grammar_of, grammar_of_calls, stop_strings
from statespan.serving.api.schemas import ChatBody, CompletionReply, Message
from statespan.serving.api.service import Service, ServiceDep
from statespan.serving.chat_template import ChatTemplate
from statespan.serving.request import Event
from statespan.serving.tool_calls import MarkedText, ToolCall, ToolCallParser, markers_of, special_token

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", response_model=CompletionReply)
async def create_chat_completion(body: ChatBody, http: Request, service: ServiceDep) -> Response:
    """Answer a conversation."""
    service.require(body.model)
    text = _render(_template(service), body)
    prompt = await service.encode(text, special=False, param="messages")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = min(service.options.default_chat_tokens, service.options.max_new_tokens) if limit is None else limit
    logprobs = (body.top_logprobs or True) if body.logprobs else False
    reply_id = f"chatcmpl-{uuid.uuid4().hex}"
    requests = engine_requests(service, body, [prompt], max_tokens=max_tokens, logprobs=logprobs, ids=[reply_id])
    session = http.headers.get("x-session-id") or body.prompt_cache_key or _conversation(body)
    grammar = grammar_of_calls(service, body) if body.must_call else grammar_of(body.response_format)
    generation = await Generation.open(service, http, requests, grammar=grammar, session=session)
    head = {"id": reply_id, "created": int(time.time()), "model": body.model}
    replies = [_Reply(service, body, prompt) for _ in range(generation.num_choices)]
    if body.stream:
        return EventStream(_chunks(body, generation, replies, head), service.options.keep_alive_s)
    collected = await unless_gone(http, _collect(body, generation, replies))
    result = head | {"object": "chat.completion", "choices": collected, "usage": generation.usage()}
    return Response(dump(result), media_type="application/json")


def _template(service: Service) -> ChatTemplate:
    if service.template is None:
        raise ApiError(
            400,
            "this checkpoint has no chat template; start the server with --chat-template plain, or a file of one",
            param="messages",
            code="no_chat_template",
        )
    return service.template


def _render(template: ChatTemplate, body: ChatBody) -> str:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or [] if body.tool_choice != "none"]
    return template.render(
        [_message(message) for message in body.messages],
        tools=tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )


def _message(message: Message) -> dict[str, Any]:
    """A message as templates know it: text for content, objects for the arguments of calls."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _function(call.function.name, call.function.arguments)}
            for call in message.tool_calls
        ]
    return plain | {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}


def _function(name: str, arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"messages: the arguments of the call of {name!r} are no JSON object", param="messages")
    return {"name": name, "arguments": value}


def _conversation(body: ChatBody) -> str:
    """What stays the same in all turns of a conversation: its messages up to the user's first."""
    first = next((place for place, message in enumerate(body.messages) if message.role == "user"), 0)
    return digest(*(message.content for message in body.messages[: first + 1]))


class _Reply:
    """One choice: its text without tool calls, its calls, its log-probabilities."""

    def __init__(self, service: Service, body: ChatBody, prompt: Sequence[int]) -> None:
        self._service, self._most_calls = service, 1 if body.parallel_tool_calls is False else None
        self._marked: MarkedText | None = None
        self._parser: ToolCallParser | None = None
        if body.tools and body.tool_choice != "none" and service.template is not None:
            markers, tokenizer = markers_of(service.template.tool_source), service.tokenizer
            self._parser = None if markers is None else ToolCallParser(markers)
            special = markers is not None and special_token(tokenizer, markers[0]) is not None
            if special and isinstance(tokenizer, FileTokenizer):
                self._marked = MarkedText(tokenizer, prompt, stop_strings(body))

    def deltas(self, event: Event) -> Iterator[tuple[dict[str, Any], str | None]]:
        """What an event adds to the message, and the finish reason with the last one."""
        text, calls, ended = event.text, list[ToolCall](), event.finish_reason
        if self._marked is not None:
            text = self._marked.push(event.token_ids, last=ended is not None)
        if self._parser is not None:
            text = self._parser.push(text)
            if ended is not None:
                rest, calls = self._parser.finish()
                text, calls = text + rest, calls[: self._most_calls]
        if text:
            yield {"content": text}, None
        for index, call in enumerate(calls):
            function = {"name": call.name, "arguments": call.arguments}
            entry = {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
            yield {"tool_calls": [entry]}, None
        if ended is not None:
            yield {}, "tool_calls" if calls and ended in ("eos", "stop") else reason_of(ended)

    def logprobs(self, event: Event) -> dict[str, Any] | None:
        """The log-probabilities of an event's tokens, where they were asked for."""
        return self._service.token_text.chat(event.token_ids, event.logprobs) if event.logprobs else None


async def _collect(body: ChatBody, generation: Generation, replies: Sequence[_Reply]) -> list[dict[str, Any]]:
    """The choices, whole: the sum of their deltas."""
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": None, "refusal": None} for _ in replies]
    logprobs: list[list[Any]] = [[] for _ in replies]
    token_ids: list[list[int]] = [[] for _ in replies]
    reasons: list[str | None] = [None] * len(replies)
    has_logprobs = False
    async with contextlib.aclosing(generation.events()) as events:
        async for index, event in events:
            message = messages[index]
            token_ids[index] += event.token_ids
            for delta, reason in replies[index].deltas(event):
                if "content" in delta:
                    message["content"] = (message["content"] or "") + delta["content"]
                for call in delta.get("tool_calls", ()):
                    message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
                reasons[index] = reason
            if (scores := replies[index].logprobs(event)) is not None:
                logprobs[index] += scores["content"]
                has_logprobs = True
    for message in messages:
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
    return [
        {
            "index": index,
            "message": message,
            "logprobs": {"content": logprobs[index], "refusal": None} if has_logprobs else None,
            "finish_reason": reasons[index],
        }
        | (
            {"token_ids": token_ids[index], "prompt_token_ids": generation.prompt(index)}
            if body.return_token_ids
            else {}
        )
        for index, message in enumerate(messages)
    ]


async def _chunks(body: ChatBody, generation: Generation, replies: Sequence[_Reply], head: dict[str, Any]) -> Chunks:
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = head | {"object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **token_ids: Sequence[int]
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head | {"choices": [choice | token_ids if body.return_token_ids else choice]}

    for index in range(len(replies)):
        yield chunk(index, {"role": "assistant", "content": ""}, prompt_token_ids=generation.prompt(index))
    async with contextlib.aclosing(generation.events()) as events:
        async for index, event in events:
            logprobs = replies[index].logprobs(event)
            deltas = list(replies[index].deltas(event))
            if not deltas and (logprobs is not None or body.return_token_ids):  # its text comes later
                deltas = [({}, None)]
            token_ids = event.token_ids
            for delta, reason in deltas:
                yield chunk(index, delta, reason, logprobs, token_ids=token_ids)
                logprobs, token_ids = None, ()
    if with_usage:
        yield head | {"choices": [], "usage": generation.usage()}
