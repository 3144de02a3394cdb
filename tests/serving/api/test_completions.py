"""/v1/completions with the real openai client, on a real engine."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from openai import APIStatusError, BadRequestError, NotFoundError, UnprocessableEntityError

from statespan.generation.generate import generate
from statespan.models.language_model import LanguageModel
from statespan.serving.api.requests import grammar_of
from statespan.serving.api.schemas import ResponseFormat

NAME = "tiny"


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": 7}, {"top_p": 0.5, "seed": 1}])
def test_text_is_that_of_generate(server: Any, model: LanguageModel, options: dict[str, Any]) -> None:
    reply = server.openai.completions.create(model=NAME, prompt="Hello", max_tokens=20, **options)
    alone = generate(model, "Hello", max_new_tokens=20, **({"temperature": 1.0} | options))
    assert reply.choices[0].text == alone.text
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 20, 25)


def test_all_forms_of_a_prompt(server: Any, model: LanguageModel) -> None:
    texts = ["One two", "Three"]
    alone = [generate(model, text, max_new_tokens=6, temperature=0).text for text in texts]
    ids = [list(text.encode()) for text in texts]
    for prompt, expected in [(texts[0], alone[:1]), (texts, alone), (ids[0], alone[:1]), (ids, alone)]:
        reply = server.openai.completions.create(model=NAME, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in reply.choices] == expected
        assert [choice.index for choice in reply.choices] == list(range(len(expected)))


def test_stream_adds_up_to_the_whole_reply(server: Any) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": ["Ab", "Cd"], "n": 2, "max_tokens": 9, "seed": 5}
    whole = server.openai.completions.create(**options)
    texts, reasons, usage = [""] * 4, [""] * 4, None
    for chunk in server.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens == 36


def test_samples_take_the_seeds_that_follow(server: Any, model: LanguageModel) -> None:
    reply = server.openai.completions.create(model=NAME, prompt=["Ab", "Cd"], n=2, max_tokens=6, seed=5)
    alone = [generate(model, "Ab" if seed < 7 else "Cd", max_new_tokens=6, seed=seed).text for seed in range(5, 9)]
    assert [choice.text for choice in reply.choices] == alone


def test_stop_ends_the_text_before_the_string(server: Any) -> None:
    whole = server.openai.completions.create(model=NAME, prompt="Stop", max_tokens=40, temperature=0).choices[0].text
    stop = whole[10:12]
    reply = server.openai.completions.create(model=NAME, prompt="Stop", max_tokens=40, temperature=0, stop=[stop])
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_and_echo_are_the_models_own(server: Any, model: LanguageModel) -> None:
    prompt = "The prompt"
    reply = server.openai.completions.create(
        model=NAME, prompt=prompt, max_tokens=5, temperature=0, logprobs=2, echo=True
    )
    choice = reply.choices[0]
    text = prompt + generate(model, prompt, max_new_tokens=5, temperature=0).text
    assert choice.text == text
    ids = [token[-1:].encode() if len(token) == 1 else bytes([int(token[-2:], 16)]) for token in choice.logprobs.tokens]
    ids = [byte[0] for byte in ids]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = [float(logprobs[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(choice.logprobs.top_logprobs[1:]):
        assert sorted(top.values()) == pytest.approx(sorted(logprobs[place].topk(2).values.tolist()), abs=1e-4)
    assert choice.logprobs.text_offset[: len(prompt)] == list(range(len(prompt)))


def test_logit_bias_decides(server: Any) -> None:
    reply = server.openai.completions.create(model=NAME, prompt="a", max_tokens=4, logit_bias={"122": 100})
    assert reply.choices[0].text == "zzzz"


def test_penalties_are_those_of_generate(server: Any, model: LanguageModel) -> None:
    penalties: dict[str, Any] = {"frequency_penalty": 0.7, "presence_penalty": -0.4}
    for temperature in (0, 0.9):
        options: dict[str, Any] = {"temperature": temperature, "seed": 4} | penalties
        reply = server.openai.completions.create(model=NAME, prompt="abcabc", max_tokens=40, **options)
        assert reply.choices[0].text == generate(model, "abcabc", max_new_tokens=40, **options).text
    free = server.openai.completions.create(model=NAME, prompt="abcabc", max_tokens=40, temperature=0)
    assert free.choices[0].text != generate(model, "abcabc", max_new_tokens=40, temperature=0, **penalties).text


def test_the_best_of_several_samples_are_given(server: Any) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": ["Ab", "Cd"], "max_tokens": 7, "seed": 5, "logprobs": 1}
    every = server.openai.completions.create(**options, n=5).choices
    reply = server.openai.completions.create(**options, n=2, best_of=5)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for place in range(2):
        likeliest = sorted(every[place * 5 : place * 5 + 5], key=lambda one: -sum(one.logprobs.token_logprobs))
        assert [one.text for one in reply.choices[place * 2 : place * 2 + 2]] == [one.text for one in likeliest[:2]]
    assert reply.usage.completion_tokens == 70
    plain = server.openai.completions.create(**options | {"logprobs": None}, best_of=5)
    assert plain.choices[0].logprobs is None and plain.choices[0].text == reply.choices[0].text


def test_echo_streams_the_prompt_first(server: Any) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": "The prompt", "max_tokens": 6, "temperature": 0}
    options |= {"echo": True, "logprobs": 1, "n": 2}
    whole = server.openai.completions.create(**options).choices
    texts, tokens, scores, offsets = ["", ""], [[], []], [[], []], [[], []]
    for chunk in server.openai.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        scores[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
        offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert texts == [choice.text for choice in whole]
    assert tokens == [choice.logprobs.tokens for choice in whole]
    assert scores == [choice.logprobs.token_logprobs for choice in whole]
    assert offsets[0][:10] == list(range(10)) and offsets[0][10] == 10


def test_json_schema_holds(server: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]  # of mixed values
    reply = server.openai.completions.create(
        model=NAME,
        prompt="a",
        max_tokens=200,
        seed=3,
        extra_body={"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
    )
    assert isinstance(json.loads(reply.choices[0].text)["n"], int)


def test_grammar_keeps_the_schema_as_it_is() -> None:
    body = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": [1]}}})
    grammar = grammar_of(body)
    assert grammar is not None and (grammar.kind, grammar.text) == ("json_schema", '{"a": [1]}')


REFUSED: list[tuple[type[APIStatusError], str, dict[str, Any]]] = [
    (NotFoundError, "there is no model 'other'", {"model": "other"}),
    (BadRequestError, "unrecognized request argument: nonsense", {"extra_body": {"nonsense": 1}}),
    (BadRequestError, "token id 256 is beyond the vocabulary", {"prompt": [256]}),
    (BadRequestError, "prompt", {"prompt": []}),
    (BadRequestError, "prompt is empty", {"prompt": ""}),
    (BadRequestError, "temperature", {"temperature": 3}),
    (BadRequestError, "temperature", {"temperature": "1"}),
    (BadRequestError, "presence_penalty", {"presence_penalty": 2.1}),
    (BadRequestError, "frequency_penalty", {"frequency_penalty": -3}),
    (BadRequestError, "best_of must be n or more", {"best_of": 2, "n": 3}),
    (BadRequestError, "best_of beyond n", {"best_of": 2, "stream": True}),
    (BadRequestError, "suffix is not supported", {"suffix": "x"}),
    (BadRequestError, "logit_bias", {"logit_bias": {"x": 1}}),
    (BadRequestError, "logit_bias", {"logit_bias": {"256": 1}}),
    (BadRequestError, "stream_options", {"stream_options": {"include_usage": True}}),
    (BadRequestError, "stop", {"stop": [""]}),
    (BadRequestError, "JSON schema", {
        "extra_body": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}}
    }),
    (UnprocessableEntityError, "max_tokens is 1001", {"max_tokens": 1001}),
    (UnprocessableEntityError, "prompt has 5000 tokens", {"prompt": "a" * 5000}),
    (UnprocessableEntityError, "are too many", {"prompt": ["a"] * 65}),
    (UnprocessableEntityError, "are too many", {"prompt": ["a"] * 40, "n": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "change"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused_is_told(server: Any, kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    with pytest.raises(kind) as caught:
        server.openai.completions.create(**({"model": NAME, "prompt": "a", "max_tokens": 2} | change))
    assert message in str(caught.value)
    error = caught.value.response.json()["error"]  # type: ignore[attr-defined]  # an APIStatusError
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]


def test_text_no_utf8_can_hold_is_no_json(server: Any) -> None:
    for text in ('"\\ud800"', "NaN", "[" * 5000, '"\x01"', "1" * 6000):
        body = b'{"model": "tiny", "prompt": %s}' % text.encode()
        reply = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, text
        assert "no JSON" in reply.json()["error"]["message"]


def test_a_form_post_of_another_site_is_refused(server: Any) -> None:
    reply = server.http.post(
        "/v1/completions", content=b'{"model": "tiny", "prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert reply.status_code == 400
    assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_many_clients_at_once_get_their_own_replies(server: Any, model: LanguageModel) -> None:
    prompts = [f"client {index}" for index in range(24)]
    replies: dict[str, str] = {}

    def ask(prompt: str) -> None:
        stream = server.openai.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0, stream=True)
        replies[prompt] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for prompt in prompts:
        assert replies[prompt] == generate(model, prompt, max_new_tokens=12, temperature=0).text


def test_without_a_tokenizer_ids_are_prompts(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted([1, 2, 3])
    running = start(backend)
    running.service.tokenizer = None
    assert running.post("completions", prompt="text").status_code == 400
    assert running.post("completions", prompt=[5]).json()["choices"][0]["text"] == ""
    assert backend.requests[0].prompt == (5,)
