"""generate and generate_stream by value: recomputed from scratch, in chunks, in batches, with seeds, stops and text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from statespan.checkpoints import load
from statespan.generation import Generation, generate, generate_stream
from statespan.models.build import build
from statespan.models.language_model import LanguageModel

PROMPT = [3, 17, 42, 8, 8, 60, 1, 29, 33, 5, 12]


def recompute(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy without any state: the whole sequence through the model for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def greedy(model: LanguageModel, prompt: Any, count: int = 12, **options: Any) -> Any:
    return generate(model, prompt, max_new_tokens=count, temperature=0, **options)


def test_greedy_equals_recomputing_from_scratch(model: LanguageModel) -> None:
    expected = recompute(model, PROMPT, 16)
    assert len(set(expected)) > 2, "a model that repeats itself proves nothing"
    result = greedy(model, PROMPT, 16)
    assert list(result.token_ids) == expected
    assert result.prompt_token_ids == tuple(PROMPT)
    assert result.finish_reason == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_chunked_prefill_equals_whole(model: LanguageModel, size: int) -> None:
    whole = greedy(model, PROMPT, 8, prefill_chunk_size=None, logprobs=3)
    chunked = greedy(model, PROMPT, 8, prefill_chunk_size=size, logprobs=3)
    assert chunked.token_ids == whole.token_ids
    for ours, theirs in zip(chunked.logprobs, whole.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("size", [None, 3])
def test_a_batch_of_unequal_prompts_equals_each_alone(model: LanguageModel, size: int | None) -> None:
    prompts = [PROMPT, PROMPT[:1], PROMPT[4:], [60, 2], PROMPT[::-1] * 2, PROMPT]
    together = greedy(model, prompts, prefill_chunk_size=size)
    for prompt, result in zip(prompts, together, strict=True):
        assert result.token_ids == greedy(model, prompt).token_ids
        assert result.prompt_token_ids == tuple(prompt)


def test_rows_that_stop_early_change_no_other(model: LanguageModel) -> None:
    prompts = [PROMPT, PROMPT[:2], PROMPT[4:], [60, 2]]
    alone = [greedy(model, prompt, 14).token_ids for prompt in prompts]
    stops = (alone[0][2], alone[2][6])
    together = greedy(model, prompts, 14, stop_token_ids=stops)
    ended = set()
    for ids, result in zip(alone, together, strict=True):
        end = next((place + 1 for place, token in enumerate(ids) if token in stops), None)
        assert result.token_ids == ids[:end]
        assert result.finish_reason == ("length" if end is None else "stop")
        ended.add(len(result.token_ids))
    assert len(ended) > 1, "all rows stopped together; that proves nothing"


def test_samples_depend_on_the_seed_and_not_on_the_batch(tiny: Callable[[str], LanguageModel]) -> None:
    """Also when rows leave the batch at different times."""
    model = tiny("jamba")
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "repetition_penalty": 4.0, "logprobs": True}
    options["stop_token_ids"] = list(range(8))
    prompts = [PROMPT[:3], PROMPT, PROMPT]
    together = generate(model, prompts, seed=12, **options)
    assert [result.seed for result in together] == [12, 13, 14]
    assert len({len(result.token_ids) for result in together}) == 3
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(model, prompt, seed=result.seed, **options)
        assert alone.token_ids == result.token_ids
        pairs = zip(alone.logprobs, result.logprobs, strict=True)
        assert all(ours.logprob == pytest.approx(theirs.logprob, abs=1e-4) for ours, theirs in pairs)
    assert generate(model, prompts, seed=12, **options)[1].token_ids == together[1].token_ids


def test_without_a_seed_torch_s_global_generator_decides(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1")

    def drawn() -> Generation:
        return generate(model, PROMPT, max_new_tokens=12)

    torch.manual_seed(11)
    first, second = drawn(), drawn()
    torch.manual_seed(11)
    assert drawn().token_ids == first.token_ids
    assert first.token_ids != second.token_ids
    assert generate(model, PROMPT, max_new_tokens=12, seed=second.seed).token_ids == second.token_ids


def test_equal_prompts_are_prefilled_once(scripted: Any) -> None:
    model = scripted({"a": b"one", "b": b"two"}, prompt_size=6)
    results = generate(model, ["a.....", "b.....", "a.....", "a....."], temperature=0)
    assert [result.text for result in results] == ["one", "two", "one", "one"]
    assert model.fed == 2 * 6 + 4 * 3


def test_logprobs_are_the_model_s_own(tiny: Callable[[str], LanguageModel]) -> None:
    """Before penalty, temperature and filters, for the chosen and for the most likely tokens."""
    model = tiny("mamba2")
    options = {"temperature": 2.5, "top_k": 9, "repetition_penalty": 1.4, "max_new_tokens": 6, "seed": 1}
    result = generate(model, PROMPT, logprobs=61, **options)
    ids = list(PROMPT)
    assert result.logprobs is not None and len(result.logprobs) == 6
    for token, reported in zip(result.token_ids, result.logprobs, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=0)
        assert reported.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        top = dict(reported.top)
        assert sum(math.exp(value) for value in top.values()) == pytest.approx(1, abs=1e-5)
        assert [value for _, value in reported.top] == sorted(top.values(), reverse=True)
        assert all(value == pytest.approx(float(expected[token]), abs=1e-4) for token, value in top.items())
        ids.append(token)
    assert result.token_ids == generate(model, PROMPT, **options).token_ids
    assert generate(model, PROMPT, **options).logprobs is None
    assert generate(model, PROMPT, logprobs=True, **options).logprobs[0].top == ()


def test_the_repetition_penalty_counts_prompt_and_new_tokens(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1")
    result = greedy(model, [PROMPT, PROMPT[:2]], 40, repetition_penalty=1e9)
    for one in result:
        tokens = one.prompt_token_ids + one.token_ids
        new = [token for place, token in enumerate(tokens) if token not in tokens[:place]]
        # With such a penalty no token comes twice before every other one has come.
        assert len(new) == len(set(one.prompt_token_ids)) + len(one.token_ids)


def test_padded_vocabulary_rows_are_never_sampled(tiny: Callable[[str], LanguageModel]) -> None:
    """The head has 64 rows for 61 tokens; the last three would win by far."""
    model = tiny("mamba1")
    with torch.no_grad():
        model.lm_head.weight[61:] = 50 * model.lm_head.weight[:1].abs()
    ids = generate(model, [PROMPT] * 20, max_new_tokens=20, temperature=5.0, seed=0)
    assert max(max(result.token_ids) for result in ids) <= 60


@pytest.mark.parametrize(
    ("script", "options", "text", "reason"),
    [
        (b"hello", {}, "hello", "eos"),
        (b"hello", {"max_new_tokens": 3}, "hel", "length"),
        (b"say: Q: what", {"stop": "Q:"}, "say: ", "stop"),
        (b"say: Q: what", {"stop": ["what", "zzz"]}, "say: Q: ", "stop"),
        (b"almost EN", {"stop": "END"}, "almost EN", "eos"),
        (b"almost EN", {"stop": "END", "max_new_tokens": 8}, "almost E", "length"),
        (b"hello", {"stop_token_ids": [ord("o")]}, "hell", "stop"),
        (b"END", {"stop": "END"}, "", "stop"),
        ("né 😀!".encode(), {}, "né 😀!", "eos"),
        ("né 😀!".encode(), {"max_new_tokens": 6}, "né \ufffd", "length"),
        (b"bad \xff\xf0\x9f end", {}, "bad \ufffd\ufffd end", "eos"),
        ("stop at 😀 now".encode(), {"stop": "😀"}, "stop at ", "stop"),
        (b"", {}, "", "eos"),
        (b"x", {"ignore_eos": True, "max_new_tokens": 4}, "x", "length"),
    ],
)
def test_text_and_reason(scripted: Any, script: bytes, options: dict[str, Any], text: str, reason: str) -> None:
    model = scripted({"a": script})
    result = generate(model, "a", temperature=0, **options)
    assert (result.text, result.finish_reason) == (text, reason)
    events = list(generate_stream(model, "a", temperature=0, **options))
    assert "".join(event.text for event in events) == text
    assert tuple(event.token_id for event in events) == result.token_ids
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [reason]
    assert len(result.token_ids) <= len(script) + 4


def test_a_stream_shows_text_as_soon_as_it_is_certain(scripted: Any) -> None:
    events = generate_stream(scripted({"a": "é ENEND".encode()}), "a", temperature=0, stop="END")
    assert [event.text for event in events] == ["", "é", " ", "", "", "EN", "", ""]


def test_token_ids_hold_the_stop_string_and_the_end_token(scripted: Any) -> None:
    model = scripted({"a": b"oneEND", "b": b"two"})
    stopped, ended = generate(model, ["a", "b"], temperature=0, stop="END")
    assert bytes(stopped.token_ids) == b"oneEND"
    assert bytes(ended.token_ids) == b"two\0"


def test_events_of_several_prompts_tell_whose_they_are(scripted: Any) -> None:
    model = scripted({"a": b"first", "b": b"2nd", "c": b""})
    texts, reasons = ["", "", ""], {}
    for event in generate_stream(model, ["a", "b", "c"], temperature=0):
        texts[event.index] += event.text
        assert event.index not in reasons
        if event.finish_reason:
            reasons[event.index] = event.finish_reason
    assert texts == ["first", "2nd", ""]
    assert reasons == {0: "eos", 1: "eos", 2: "eos"}


def test_prompts_may_be_text_lists_or_tensors(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("gru")
    expected = greedy(model, PROMPT).token_ids
    assert greedy(model, tuple(PROMPT)).token_ids == expected
    assert greedy(model, torch.tensor(PROMPT)).token_ids == expected
    assert [result.token_ids for result in greedy(model, torch.tensor([PROMPT, PROMPT]))] == [expected, expected]
    assert [result.token_ids for result in greedy(model, [PROMPT])] == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_tensor_with_its_mask_equals_the_prompts_alone(
    tiny: Callable[[str], LanguageModel], side: str
) -> None:
    model, prompts = tiny("jamba"), [PROMPT, PROMPT[:3], [60]]
    ids, mask = torch.full((3, 11), 9), torch.zeros(3, 11, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(11 - len(prompt), 11) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    results = greedy(model, ids, attention_mask=mask)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == greedy(model, prompt).token_ids


def test_an_empty_prompt_becomes_the_begin_token(scripted: Any) -> None:
    result = generate(scripted({"\1": b"from nothing"}), "", temperature=0)
    assert (result.text, result.prompt_token_ids) == ("from nothing", (1,))


def test_a_begin_token_stands_only_at_the_beginning(scripted: Any) -> None:
    model = scripted({"\1": b"answer"}, prompt_size=3)
    encode = model.tokenizer.encode
    model.tokenizer.encode = lambda text: [1, *encode(text)]
    first = generate(model, "ab", temperature=0, max_new_tokens=2, return_state=True)
    assert first.prompt_token_ids == (1, 97, 98)
    second = generate(model, "cd", state=first.state)
    assert second.prompt_token_ids == (99, 100)


def test_a_training_model_is_left_training(tiny: Callable[[str], LanguageModel]) -> None:
    """Modules keep their own modes, also when a stream is not read to its end, or another ends before it."""
    model = tiny("jamba").train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    expected = greedy(tiny("jamba"), PROMPT).token_ids
    assert greedy(model, PROMPT).token_ids == expected
    assert [module.training for module in model.modules()] == before
    stream = generate_stream(model, PROMPT, temperature=0, max_new_tokens=12)
    ids = [next(stream).token_id]
    assert not model.training
    assert greedy(model, PROMPT).token_ids == expected
    next(generate_stream(model, PROMPT))
    ids += [event.token_id for event in stream]
    assert tuple(ids) == expected
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_a_suspended_stream_leaves_autograd_alone(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("gru")
    stream = generate_stream(model, PROMPT, max_new_tokens=3)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([PROMPT])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(list(stream)) == 2


def test_timing_is_measured(scripted: Any) -> None:
    timing = generate(scripted({"a": b"some text"}), "a", temperature=0).timing
    assert timing.prefill_s > 0 and timing.decode_s > 0
    assert timing.tokens_per_s == pytest.approx(9 / timing.decode_s)
    assert generate(scripted({"a": b""}), "a", temperature=0).timing.tokens_per_s == 0


def test_no_prompts_give_no_generations(scripted: Any) -> None:
    assert generate(scripted({}), torch.zeros(0, 3, dtype=torch.int64)) == []


def test_a_new_model_of_bytes_reads_text_without_files(tmp_path: Path) -> None:
    model = build("jamba-demo", seed=0)
    options: Any = {"max_new_tokens": 12, "temperature": 0}
    ids = generate(model, list("né".encode()), **options).token_ids
    answer = generate(model, "né", **options)
    assert answer.token_ids == ids and answer.text == bytes(ids).decode(errors="replace")
    model.save(tmp_path / "saved")
    assert generate(load(tmp_path / "saved"), "né", **options).text == answer.text
