"""/v1/chat/completions: messages through the template, streams, tools, JSON, with the real openai client."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import BadRequestError
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from statespan.checkpoints.tokenizer import FileTokenizer
from statespan.generation.generate import generate
from statespan.models.language_model import LanguageModel
from statespan.serving.backend import Grammar

NAME = "tiny"
ASK: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": [1, 2]}}</tool_call>'
TOOL_TEMPLATE = """
{%- if tools %}<tool_call> {{ tools | tojson }}{% endif %}
{%- for message in messages %}<{{ message.role }}>{{ message.content }}
{%- for call in message.tool_calls or [] %}({{ call.function.name }}:{{ call.function.arguments.a }}){% endfor %}
{%- endfor %}"""


def prompt_of(backend: Any) -> str:
    return bytes(backend.requests[-1].prompt).decode()


def test_reply_continues_the_templates_text(server: Any, model: LanguageModel) -> None:
    messages = [{"role": "developer", "content": "Be kind."}, *ASK]
    reply = server.openai.chat.completions.create(model=NAME, messages=messages, max_tokens=12, temperature=0)
    text = "System: Be kind.\n\nUser: Hi\n\nAssistant:"
    assert reply.choices[0].message.content == generate(model, text, max_new_tokens=12, temperature=0).text
    assert (reply.object, reply.choices[0].finish_reason) == ("chat.completion", "length")
    assert reply.usage.prompt_tokens == len(text)


def test_stream_adds_up_to_the_whole_reply(server: Any) -> None:
    options: dict[str, Any] = {"model": NAME, "messages": ASK, "n": 2, "max_tokens": 10, "seed": 2}
    options |= {"logprobs": True, "top_logprobs": 1}
    whole = server.openai.chat.completions.create(**options)
    texts, roles, logprobs, reasons = ["", ""], ["", ""], [[], []], ["", ""]
    for chunk in server.openai.chat.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role or ""
        logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
        reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 2 and reasons == ["length"] * 2
    for mine, choice in zip(logprobs, whole.choices, strict=True):
        assert [entry.token for entry in mine] == [entry.token for entry in choice.logprobs.content]
        assert bytes(byte for entry in mine for byte in entry.bytes).decode(errors="replace") == choice.message.content
        assert len(mine) == 10 and all(len(entry.top_logprobs) == 1 for entry in mine)


def test_json_mode_gives_an_object(server: Any) -> None:
    reply = server.openai.chat.completions.create(
        model=NAME, messages=ASK, max_tokens=150, seed=1, response_format={"type": "json_object"}
    )
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(reply.choices[0].message.content), dict)
    assert reply.choices[0].message.content.lstrip().startswith("{")


def test_json_schema_reaches_the_engine(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    start(backend).openai.chat.completions.create(
        model=NAME,
        messages=ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert backend.grammars == [Grammar("json_schema", json.dumps(schema))]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_tool_calls(start: Callable[..., Any], scripted: Any, stream: bool, before: str) -> None:
    backend = scripted(before + CALL)
    client = start(backend, template=TOOL_TEMPLATE).openai
    options: dict[str, Any] = {"model": NAME, "messages": ASK, "tools": TOOLS, "tool_choice": "auto"}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        content = "".join(delta.content or "" for delta in deltas)
        (call,) = [call for delta in deltas for call in delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        content, reason, (call,) = choice.message.content or "", choice.finish_reason, choice.message.tool_calls
    assert (content, reason) == (before, "tool_calls")
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": [1, 2]})
    assert call.id.startswith("call_") and call.type == "function"
    assert '"name": "add"' in prompt_of(backend)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"enum": [1, 2]}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"place": {"type": "string", "maxLength": 4}},
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_asked_for_comes(server: Any, stream: bool, choice: Any) -> None:
    """A model with random weights calls as the schema says, since it may write nothing else."""
    nothing: Any = {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "maxProperties": 0}},
    }
    options: dict[str, Any] = {"model": NAME, "messages": ASK, "tools": [WEATHER, nothing], "tool_choice": choice}
    names = set[str]()
    for seed in range(4):
        if stream:
            chunks = list(server.openai.chat.completions.create(**options, seed=seed, max_tokens=600, stream=True))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            content, reason = (
                "".join(c.choices[0].delta.content or "" for c in chunks),
                chunks[-1].choices[0].finish_reason,
            )
        else:
            one = server.openai.chat.completions.create(**options, seed=seed, max_tokens=600).choices[0]
            calls, content, reason = one.message.tool_calls, one.message.content or "", one.finish_reason
        assert (len(calls), content, reason) == (1, "", "tool_calls")
        arguments = json.loads(calls[0].function.arguments)
        names.add(calls[0].function.name)
        if calls[0].function.name == "weather":
            assert set(arguments) == {"place", "days"} and len(arguments["place"]) <= 4 and arguments["days"] in (1, 2)
    assert names <= ({"weather", "now"} if choice == "required" else {"weather"})


def test_one_call_at_most_where_no_more_are_wanted(start: Callable[..., Any], scripted: Any) -> None:
    client = start(scripted(CALL + CALL), template=TOOL_TEMPLATE).openai
    options: dict[str, Any] = {"model": NAME, "messages": ASK, "tools": TOOLS}
    for parallel, count in [(True, 2), (False, 1)]:
        reply = client.chat.completions.create(**options, parallel_tool_calls=parallel)
        assert len(reply.choices[0].message.tool_calls) == count


def test_what_is_required_reaches_the_engine(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted(CALL)
    client = start(backend, template=TOOL_TEMPLATE).openai
    options: dict[str, Any] = {"model": NAME, "messages": ASK, "tools": [*TOOLS, WEATHER]}
    client.chat.completions.create(**options, tool_choice="required")
    client.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
    client.chat.completions.create(**options, tool_choice={"type": "function", "function": {"name": "add"}})
    client.chat.completions.create(**options)
    found = [grammar and grammar.calls for grammar in backend.grammars]
    assert [calls and (calls.markers[0], [name for name, _ in calls.functions], calls.several) for calls in found] == [
        ("<tool_call>", ["add", "weather"], True),
        ("<tool_call>", ["add", "weather"], False),
        ("<tool_call>", ["add"], False),
        None,
    ]


def test_a_template_without_a_known_form_cannot_be_made_to_call(start: Callable[..., Any], scripted: Any) -> None:
    client = start(scripted("x"), template="{{ tools }}").openai
    with pytest.raises(BadRequestError, match="cannot be required"):
        client.chat.completions.create(model=NAME, messages=ASK, tools=TOOLS, tool_choice="required")


def test_a_turn_with_the_tools_answer(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("3")
    client = start(backend, template=TOOL_TEMPLATE).openai
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    turn: list[Any] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}],
        },
    ]
    client.chat.completions.create(model=NAME, messages=ASK + turn)
    assert prompt_of(backend) == "<user>Hi<assistant>(add:7)<tool>3\n4"
    call["function"]["arguments"] = "no JSON"  # type: ignore[index]  # a nested dict
    with pytest.raises(BadRequestError, match="arguments of the call of 'add'"):
        client.chat.completions.create(model=NAME, messages=ASK + turn)


def test_tools_are_left_out_when_none_is_chosen(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted(CALL)
    client = start(backend, template=TOOL_TEMPLATE).openai
    reply = client.chat.completions.create(model=NAME, messages=ASK, tools=TOOLS, tool_choice="none")
    assert reply.choices[0].message.content == CALL
    assert "add" not in prompt_of(backend)


def test_marks_that_are_special_tokens(start: Callable[..., Any], scripted: Any) -> None:
    """Jamba's marks are tokens that decoding leaves out; the call is found all the same, and stops still work."""
    vocabulary = {char: place for place, char in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    backend.add_special_tokens([AddedToken(text) for text in ("<tool_calls>", "</tool_calls>", "<end>")])
    tokenizer = FileTokenizer(backend, eos_ids=(258,))
    reply = '<tool_calls>[{"name": "add", "arguments": {"a": 1}}]</tool_calls><end>'
    ids = tokenizer.encode(reply)
    assert "<" not in tokenizer.decode(ids)
    template = TOOL_TEMPLATE.replace("<tool_call>", "<tool_calls>")
    server = start(scripted(ids), template=template, tokenizer=tokenizer)
    server.service.config = server.service.config.replace(vocab_size=259)
    create = server.openai.chat.completions.create
    choice = create(model=NAME, messages=ASK, tools=TOOLS).choices[0]
    assert choice.message.tool_calls[0].function.arguments == '{"a": 1}'
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    cut = create(model=NAME, messages=ASK, tools=TOOLS, stop=["arguments"]).choices[0]
    assert cut.message.content == '<tool_calls>[{"name": "add", "'


def test_special_tokens_of_the_template_are_not_added_twice(start: Callable[..., Any], scripted: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    vocabulary = {char: place for place, char in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken("<s>")])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    engine = scripted("x")
    server = start(engine, template="{{ messages[0].content }}", tokenizer=FileTokenizer(backend))
    server.service.config = server.service.config.replace(vocab_size=257)
    assert server.post("chat/completions", messages=ASK).status_code == 200
    assert 256 not in engine.requests[-1].prompt
    assert server.post("completions", prompt="Hi").status_code == 200
    assert engine.requests[-1].prompt[0] == 256


def test_limits_of_the_reply(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("abcdef")
    client = start(backend, default_chat_tokens=77).openai
    for options, expected in [({}, 77), ({"max_tokens": 5}, 5), ({"max_tokens": 5, "max_completion_tokens": 4}, 4)]:
        client.chat.completions.create(model=NAME, messages=ASK, **options)
        assert backend.requests[-1].options.max_new_tokens == expected


def test_sessions_stay_together(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x")
    server = start(backend)
    turns: list[Any] = [{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "More"}]
    server.post("chat/completions", messages=ASK)
    server.post("chat/completions", messages=ASK + turns)
    server.post("chat/completions", messages=[{"role": "user", "content": "Other"}])
    server.post("chat/completions", messages=ASK, prompt_cache_key="mine")
    server.http.post("/v1/chat/completions", json={"model": NAME, "messages": ASK}, headers={"X-Session-Id": "s1"})
    first, second, other, key, header = backend.sessions
    assert first == second != other
    assert (key, header) == ("mine", "s1")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("messages", {"messages": []}),
        ("content of a user message", {"messages": [{"role": "user"}]}),
        ("role", {"messages": [{"role": "bard", "content": "x"}]}),
        (
            "messages.0.content",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        ("top_logprobs", {"top_logprobs": 2}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "always"}),
        ("there are no tools", {"tool_choice": "required"}),
        ("'sub', which is none", {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sub"}}}),
        (
            "exclude each other",
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        ),
        ("frequency_penalty", {"frequency_penalty": 2.5}),
        ("functions", {"extra_body": {"functions": []}}),
        ("json_schema", {"response_format": {"type": "json_schema"}}),
        ("modalities", {"modalities": ["audio"]}),
    ],
)
def test_what_is_refused_is_told(server: Any, message: str, change: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match=message):
        server.openai.chat.completions.create(**({"model": NAME, "messages": ASK, "max_tokens": 2} | change))


def test_a_base_model_has_no_chat(start: Callable[..., Any], scripted: Any) -> None:
    client = start(scripted("x"), template=None).openai
    with pytest.raises(BadRequestError, match="--chat-template plain"):
        client.chat.completions.create(model=NAME, messages=ASK)


def test_a_template_that_refuses(start: Callable[..., Any], scripted: Any) -> None:
    client = start(scripted("x"), template="{{ raise_exception('no system message here') }}").openai
    with pytest.raises(BadRequestError, match="no system message here"):
        client.chat.completions.create(model=NAME, messages=ASK)


def test_fields_that_do_nothing_here_are_accepted(server: Any) -> None:
    server.openai.chat.completions.create(
        model=NAME,
        messages=[{"role": "assistant", "content": "x", "refusal": None}, *ASK],
        max_completion_tokens=1,
        user="u",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        presence_penalty=0,
        modalities=["text"],
    )
