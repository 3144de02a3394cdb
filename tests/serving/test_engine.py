"""The engine: a request gives what `generate` gives alone, whatever runs beside it, and nothing leaks."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import statespan
from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.generation import GenerationOptions
from statespan.models.language_model import LanguageModel
from statespan.serving.decode import PlainDecode
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, QueueFull, Request, RequestRefused
from statespan.serving.runner import Chunk
from statespan.serving.scheduler import MOST_PASSED

OPTIONS = EngineOptions(max_rows=4, num_pages=120, page_size=4, prefill_tokens=16, snapshot_interval=8)
PROMPT = (7, 3, 11, 40, 22, 22, 5, 1, 60, 13, 2)


def sharpened(model: LanguageModel) -> LanguageModel:
    """Mixers weigh more than fresh ones do, and the head too, so that tokens depend on the past."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
            if name == "final_norm.weight":
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def model(hybrid: LanguageModel) -> LanguageModel:
    return sharpened(hybrid)


@dataclass
class Reply:
    """All that came for one sample."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    events: list[Event] = field(default_factory=list)

    @property
    def reason(self) -> str | None:
        assert all(event.finish_reason is None for event in self.events[:-1]), "something came after the end"
        return self.events[-1].finish_reason

    @property
    def usage(self) -> Any:
        return self.events[-1].usage


class Client:
    """Submits to an engine, steps it, and collects replies; `ahead` as a GPU does it, a step before tokens are read."""

    def __init__(
        self, model: LanguageModel, options: EngineOptions = OPTIONS, tokenizer: Any = None, ahead: bool = False
    ) -> None:
        self.engine = Engine(model, options, tokenizer)
        if ahead:
            self.engine.use(PlainDecode(self.engine.runner, model.config.vocab_size, model.device, ahead=True))
        self.replies: dict[tuple[str, int], Reply] = {}

    def submit(self, prompt: Iterable[int] = PROMPT, id: str = "a", **keywords: Any) -> Request:
        names = {"priority", "deadline_s", "num_samples", "logit_bias", "constraint", "reuse"}
        own = {name: keywords.pop(name) for name in names & keywords.keys()}
        keywords = {"temperature": 0, "max_new_tokens": 6} | keywords
        request = Request(tuple(prompt), GenerationOptions(**keywords), id=id, **own)
        self.engine.submit(request)
        return request

    def step(self) -> list[Event]:
        events = self.engine.step()
        for event in events:
            reply = self.replies.setdefault((event.request_id, event.index), Reply())
            reply.ids += event.token_ids
            reply.text += event.text
            reply.events.append(event)
        self.engine.check()
        return events

    def run(self) -> None:
        for _ in range(2000):
            if self.engine.idle:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def one(self, *arguments: Any, **keywords: Any) -> Reply:
        request = self.submit(*arguments, **keywords)
        self.run()
        return self.replies.pop((request.id, 0))


def alone(model: LanguageModel, request: Request, index: int = 0) -> Any:
    """What `generate` gives."""
    options = {f: getattr(request.options, f) for f in GenerationOptions.__dataclass_fields__}
    if request.options.seed is not None:
        options["seed"] = request.options.seed + index
    return statespan.generate(model, list(request.prompt), **options)


# -- equal to generate


@pytest.mark.parametrize("ahead", [False, True])
def test_every_family_greedy_and_sampled(family: LanguageModel, ahead: bool) -> None:
    model = sharpened(family)
    client = Client(model, ahead=ahead)
    ways = [
        {},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_p": 0.9, "top_k": 20, "seed": 6},
        {"temperature": 1.0, "repetition_penalty": 3.0, "min_p": 0.02, "seed": 7},
        {"repetition_penalty": 2.0, "max_new_tokens": 12},
        {"max_new_tokens": 1, "temperature": 2.0, "seed": 8},
    ]
    prompts = [PROMPT, PROMPT[:1], PROMPT * 4, PROMPT[:6], (*PROMPT[:6], 9, 9), PROMPT]
    requests = [client.submit(p, id=str(n), **way) for n, (p, way) in enumerate(zip(prompts, ways, strict=True))]
    client.run()
    replies = [client.replies[request.id, 0] for request in requests]
    for request, reply in zip(requests, replies, strict=True):
        expected = alone(model, request)
        assert tuple(reply.ids) == expected.token_ids
        assert reply.reason == expected.finish_reason
    assert len({tuple(reply.ids[:3]) for reply in replies}) > 3, "tokens that depend on nothing prove nothing"


def test_text_stops_and_log_probabilities(model: LanguageModel) -> None:
    class Letters(ByteTokenizer):
        """Ids as letters, some of which make longer stop strings."""

        def decode(self, ids: list[int]) -> str:
            return "".join("abcdé"[i % 5] for i in ids)

    model = copy.copy(model)
    model.tokenizer = Letters()
    client = Client(model)
    first = alone(model, Request(PROMPT, GenerationOptions(max_new_tokens=20, temperature=1.0, seed=1)))
    ways: list[dict[str, Any]] = [
        {"stop": first.text[5:8]},
        {"stop": ("zz", first.text[3])},
        {"stop_token_ids": first.token_ids[7:8], "logprobs": True},
        {"logprobs": 3},
        {"logprobs": 0, "max_new_tokens": 2},
    ]
    for number, way in enumerate(ways):
        way = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1} | way
        request = client.submit(id=str(number), **way)
    client.run()
    for number, way in enumerate(ways):
        request = Request(PROMPT, GenerationOptions(**{"max_new_tokens": 20, "temperature": 1.0, "seed": 1} | way))
        expected, reply = alone(model, request), client.replies[str(number), 0]
        assert (reply.text, reply.reason) == (expected.text, expected.finish_reason)
        assert tuple(reply.ids) == expected.token_ids
        logprobs = [one for event in reply.events for one in event.logprobs]
        assert len(logprobs) == len(expected.logprobs or ())
        for ours, theirs in zip(logprobs, expected.logprobs or (), strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]


def test_end_tokens(model: LanguageModel) -> None:
    last = alone(model, Request(PROMPT, GenerationOptions(max_new_tokens=4, temperature=0))).token_ids[-1]
    model = copy.copy(model)
    model.config = model.config.replace(eos_token_ids=(last,))
    client = Client(model)
    assert client.one(max_new_tokens=9).reason == "eos"
    assert client.one(max_new_tokens=9, ignore_eos=True).reason == "length"


@pytest.mark.parametrize("ahead", [False, True])
def test_rows_that_end_by_themselves_make_room(model: LanguageModel, ahead: bool) -> None:
    """A step ahead runs when a reply ends with a token; the next request takes over the row at once."""
    model = copy.copy(model)
    model.config = model.config.replace(eos_token_ids=tuple(range(0, 61, 6)))
    client = Client(model, EngineOptions(max_rows=2, num_pages=120, page_size=4), ahead=ahead)
    requests = [
        client.submit([n, *PROMPT], id=str(n), temperature=1.0, seed=n, max_new_tokens=9, reuse=n % 3 > 0)
        for n in range(30)
    ]
    client.run()
    reasons = set[str]()
    for request in requests:
        expected, reply = alone(model, request), client.replies[request.id, 0]
        assert (tuple(reply.ids), reply.reason) == (expected.token_ids, expected.finish_reason)
        reasons.add(expected.finish_reason)
    assert reasons == {"eos", "length"}
    again = client.submit((*requests[1].prompt, *client.replies["1", 0].ids, 3), id="turn", seed=2)
    client.run()
    assert tuple(client.replies["turn", 0].ids) == alone(model, again).token_ids
    # All but the new token; where the step ahead had absorbed the reply's last one, that too.
    assert client.replies["turn", 0].usage.cached_tokens in (len(again.prompt) - 2, len(again.prompt) - 1)


def test_samples_of_one_prompt_are_prefilled_once(model: LanguageModel) -> None:
    client = Client(model)
    request = client.submit(num_samples=3, temperature=1.0, seed=20, reuse=False)
    client.run()
    for index in range(3):
        reply = client.replies["a", index]
        assert tuple(reply.ids) == alone(model, request, index).token_ids
        assert reply.usage.completion_tokens == 6 and reply.usage.prompt_tokens == len(PROMPT)
    assert client.engine.metrics().prefill_tokens == len(PROMPT) - 1


def test_no_new_tokens_only_prefills(model: LanguageModel) -> None:
    client = Client(model)
    reply = client.one(max_new_tokens=0)
    assert (reply.ids, reply.reason, reply.usage.completion_tokens) == ([], "length", 0)
    assert client.one().usage.cached_tokens == len(PROMPT) - 1


def test_a_bias_and_a_constraint(model: LanguageModel) -> None:
    class Even:
        """Even tokens, four of them."""

        def __init__(self, count: int = 0) -> None:
            self.count = count

        def mask(self) -> Tensor:
            return torch.arange(61) % 2 == 0

        def accept(self, token_id: int) -> None:
            self.count += 1

        def fork(self) -> "Even":
            return Even(self.count)

        @property
        def finished(self) -> bool:
            return self.count == 4

    client = Client(model)
    client.submit(id="bias", logit_bias={17: 1000.0, 18: 900.0})
    client.submit(id="ban", logit_bias={i: -1e9 for i in range(61) if i not in (3, 4)}, temperature=1.0, seed=1)
    client.submit(id="even", constraint=(even := Even()), temperature=1.5, num_samples=2)
    plain = client.submit(id="plain", temperature=1.0, seed=3)
    client.run()
    assert client.replies["bias", 0].ids == [17] * 6
    assert set(client.replies["ban", 0].ids) == {3, 4}
    for index in range(2):
        reply = client.replies["even", index]
        assert len(reply.ids) == 4 and all(i % 2 == 0 for i in reply.ids) and reply.reason == "stop"
    assert even.count == 0
    assert tuple(client.replies["plain", 0].ids) == alone(model, plain).token_ids


# -- the prefix cache


def test_a_second_turn_prefills_only_what_is_new(model: LanguageModel) -> None:
    client = Client(model)
    first = client.one(PROMPT * 5, max_new_tokens=10, temperature=1.0, seed=2)
    before = client.engine.metrics().prefill_tokens
    turn = (*PROMPT * 5, *first.ids, 4, 4, 8)
    request = client.submit(turn, id="b", temperature=1.0, seed=3)
    client.run()
    reply = client.replies["b", 0]
    # The last token of the reply and two of the new ones; the third waits for the decode step.
    assert client.engine.metrics().prefill_tokens - before == 3
    assert reply.usage.cached_tokens == len(turn) - 4
    assert tuple(reply.ids) == alone(model, request).token_ids


def test_the_same_prompt_again_prefills_nothing(model: LanguageModel) -> None:
    client = Client(model)
    client.one()
    before = client.engine.metrics().prefill_tokens
    again = client.submit(temperature=1.0, seed=9)
    client.run()
    assert client.engine.metrics().prefill_tokens == before
    assert tuple(client.replies["a", 0].ids) == alone(model, again).token_ids


def test_the_third_prompt_with_a_beginning_finds_it(model: LanguageModel) -> None:
    client = Client(model, EngineOptions(max_rows=4, num_pages=120, page_size=4, snapshot_interval=1000))
    shared = PROMPT * 3
    cached = []
    for tail in ((1, 2), (3, 4), (5, 6)):
        request = client.submit((*shared, *tail), id=str(tail), temperature=1.0, seed=4)
        client.run()
        reply = client.replies[request.id, 0]
        assert tuple(reply.ids) == alone(model, request).token_ids
        cached.append(reply.usage.cached_tokens)
    assert cached == [0, 0, len(shared)]
    metrics = client.engine.metrics()
    assert (metrics.cache_lookups, metrics.cache_hits) == (3, 1)
    assert metrics.cache_known_tokens == len(shared)
    assert "1 of 3 requests hit" in metrics.cache_summary and "33 more tokens were known" in metrics.cache_summary


def test_a_cache_that_never_hits_says_why(model: LanguageModel) -> None:
    client = Client(model)
    assert "no look-ups" in client.engine.metrics().cache_summary
    client.one((1, 2, 3))
    client.one((2, 2, 3))
    assert "0 of 2" in client.engine.metrics().cache_summary
    assert "no prompt began like an earlier one" in client.engine.metrics().cache_summary


def test_without_reuse_nothing_is_kept_or_found(model: LanguageModel) -> None:
    client = Client(model)
    client.one(reuse=False)
    assert client.engine.metrics().cache_snapshots == 0
    client.one()
    assert client.one(reuse=False).usage.cached_tokens == 0
    assert Client(model, EngineOptions(max_rows=1, num_pages=20, cache_bytes=0)).one().reason == "length"


def test_running_requests_take_the_cache_s_pages(model: LanguageModel) -> None:
    """What only the tree holds is given up for a request, its own prefix last."""
    client = Client(model, EngineOptions(max_rows=2, num_pages=21, page_size=4))
    client.one(range(30))
    client.one(range(30, 60))
    assert client.engine.pool.pages.num_free < 10
    request = client.submit((*range(30), 5, 5), id="b", max_new_tokens=20)
    client.run()
    assert client.replies["b", 0].usage.cached_tokens >= 29
    assert tuple(client.replies["b", 0].ids) == alone(model, request).token_ids
    assert client.one(range(50), max_new_tokens=30).reason == "length"  # all twenty pages


def test_a_snapshot_goes_out_and_comes_back(model: LanguageModel, tmp_path: Path) -> None:
    one = Client(model).engine.pool.row_bytes + 4000
    for spill in ({"spill_bytes": 1 << 20}, {"spill_dir": tmp_path}):
        client = Client(model, EngineOptions(max_rows=2, num_pages=60, page_size=4, cache_bytes=2 * one, **spill))
        for start in range(6):
            client.one(range(start, start + 20))
        request = client.submit((*range(20), 7), temperature=1.0, seed=1)
        client.run()
        reply = client.replies["a", 0]
        assert reply.usage.cached_tokens == 19 and tuple(reply.ids) == alone(model, request).token_ids
        metrics = client.engine.metrics()
        assert metrics.spill_restored >= 1 and metrics.spilled >= 5 and metrics.spill_dropped == 0
        assert metrics.cache_bytes <= 2 * one
        client.engine.close()
    again = Client(model, EngineOptions(max_rows=2, num_pages=60, page_size=4, spill_dir=tmp_path))
    assert again.one((*range(5, 25), 6)).usage.cached_tokens == 19
    restored = again.engine.metrics()
    assert restored.spill_restored == 1 and restored.cache_hits == 1


def test_what_a_window_left_behind_is_free(family: LanguageModel, tmp_path: Path) -> None:
    """Conversations through cache and disk, in families with and without a window: the books are checked each step."""
    model = sharpened(family)
    options = EngineOptions(max_rows=3, num_pages=60, page_size=4, cache_bytes=40_000, spill_dir=tmp_path)
    client = Client(model, options)
    seen = [PROMPT[: 3 + n] for n in range(3)]
    for turn in range(3):
        requests = [
            client.submit(
                prompt, id=f"{turn} {n}", max_new_tokens=14, temperature=1.0, seed=turn, num_samples=1 + n % 2
            )
            for n, prompt in enumerate(seen)
        ]
        client.run()
        for request in requests:
            for index in range(request.num_samples):
                reply = client.replies[request.id, index]
                assert tuple(reply.ids) == alone(model, request, index).token_ids
        seen = [(*request.prompt, *client.replies[request.id, 0].ids, 4, 2) for request in requests]
    window = model.config.attention.sliding_window
    cache = client.engine.cache
    assert cache is not None and window in (None, 7)
    if window and client.engine.pool.pages_for(1):
        for node in cache.nodes():
            assert node.snapshot is None or len(node.snapshot.pages) <= 3


def test_prompts_that_arrive_together_are_prefilled_once(model: LanguageModel) -> None:
    """The first one absorbs what they share, the others wait for its snapshot."""
    client = Client(model, EngineOptions(max_rows=4, num_pages=200, page_size=4, prefill_tokens=16))
    shared = PROMPT * 4
    tails = [(), (), (1, 2), (3, 4, 5), (1, 2)]
    requests = [client.submit((*shared, *tail), id=str(n), temperature=1.0, seed=n) for n, tail in enumerate(tails)]
    client.step()
    assert client.engine.metrics().prefilling == 1 and client.engine.metrics().waiting == 4
    client.run()
    for request in requests:
        assert tuple(client.replies[request.id, 0].ids) == alone(model, request).token_ids
    # The second prompt is the first one; the third has it and its own tail; the fifth is the third.
    assert client.engine.metrics().prefill_tokens == (len(shared) - 1) + 2 + 3
    assert client.replies["1", 0].usage.cached_tokens == len(shared) - 1


def test_a_long_prompt_hurries_to_where_others_wait(model: LanguageModel) -> None:
    client = Client(model, EngineOptions(max_rows=6, num_pages=900, page_size=4, prefill_tokens=16))
    shared = PROMPT * 4
    for number in range(3):
        client.submit([(i * i + number) % 61 for i in range(200)], id=f"other {number}", max_new_tokens=1)
    client.submit((*shared, *(i % 61 for i in range(2000))), id="long", max_new_tokens=1)
    request = client.submit((*shared, 9, 9), id="short", temperature=1.0, seed=1)
    steps = 0
    while ("short", 0) not in client.replies:
        client.step()
        steps += 1
    assert ("long", 0) not in client.replies and steps < 12
    client.run()
    assert client.replies["short", 0].usage.cached_tokens == len(shared)
    assert tuple(client.replies["short", 0].ids) == alone(model, request).token_ids


def test_who_waits_for_a_prompt_that_ends_early_goes_alone(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in ("cancelled", "fails", "not kept"):
        cache_bytes = 1 << 14 if way == "not kept" else 1 << 20
        options = EngineOptions(max_rows=4, num_pages=200, page_size=4, prefill_tokens=8, cache_bytes=cache_bytes)
        client = Client(model, options)
        client.submit(PROMPT * 4, id="first")
        second = client.submit(PROMPT * 4, id="second", temperature=1.0, seed=3)
        client.step()
        assert client.engine.metrics().waiting == (way != "not kept")
        if way == "cancelled":
            client.engine.cancel("first")
        if way == "fails":
            with monkeypatch.context() as patch:
                patch.setattr(client.engine.runner, "absorb", lambda chunks: 1 / 0)
                client.step()
        client.run()
        assert tuple(client.replies["second", 0].ids) == alone(model, second).token_ids


# -- who runs when


def test_a_long_prompt_does_not_hold_up_short_ones(model: LanguageModel) -> None:
    """Short prompts that come while 2,000 tokens are prefilled have their first token in the step that admits them."""
    options = EngineOptions(max_rows=4, num_pages=600, page_size=4, prefill_tokens=40, cache_bytes=0)
    client = Client(model, options)
    client.submit([i % 61 for i in range(2000)], id="long", max_new_tokens=1)
    client.step()
    waits = []
    for number in range(12):
        client.submit(PROMPT, id=str(number), max_new_tokens=2)
        steps = 0
        while (str(number), 0) not in client.replies:
            client.step()
            steps += 1
        waits.append(steps)
    assert ("long", 0) not in client.replies
    # On a GPU a decode step of the others may be under way, whose end is awaited first.
    assert max(waits) == (2 if model.device.type == "cuda" else 1)
    while ("long", 0) not in client.replies:
        client.step()
    assert client.engine.metrics().steps <= 2000 / (40 * 0.25) + 2


def test_a_long_prompt_is_not_held_up_for_ever(model: LanguageModel) -> None:
    """Short prompts without end: the long one still gets its share of each step."""
    options = EngineOptions(max_rows=4, num_pages=600, page_size=4, prefill_tokens=40, cache_bytes=0)
    client = Client(model, options)
    client.submit([i % 61 for i in range(400)], id="long", max_new_tokens=1)
    for number in range(200):
        for copy_ in range(3):
            client.submit(PROMPT * 2, id=f"{number}.{copy_}", max_new_tokens=1)
        client.step()
        if ("long", 0) in client.replies:
            break
    assert number <= 400 / (40 * 0.25) + 1


def test_priority_then_arrival(model: LanguageModel) -> None:
    client = Client(model, EngineOptions(max_rows=1, num_pages=50))
    for name, priority in (("low", -1), ("a", 0), ("b", 0), ("high", 3)):
        client.submit(id=name, priority=priority, max_new_tokens=2)
    client.run()
    assert [name for name, _ in client.replies] == ["high", "a", "b", "low"]


def test_admission_waits_for_memory(model: LanguageModel) -> None:
    """Three requests of eight pages, and twenty of them: the third one waits for the end of another."""
    client = Client(model, EngineOptions(max_rows=4, num_pages=21, page_size=4, cache_bytes=0))
    for name in "abc":
        client.submit(PROMPT, id=name, max_new_tokens=18)
    client.step()
    metrics = client.engine.metrics()
    assert (metrics.decoding, metrics.waiting) == (2, 1)
    assert metrics.pages_free == 4
    client.run()
    assert [reply.reason for reply in client.replies.values()] == ["length"] * 3


def test_small_requests_pass_a_large_one_but_not_for_ever(model: LanguageModel) -> None:
    """Twenty pages: "large" needs fifteen, which "first" leaves free only when small ones stop passing."""
    client = Client(model, EngineOptions(max_rows=4, num_pages=21, page_size=4, cache_bytes=0))
    client.submit(PROMPT, id="first", max_new_tokens=21)  # eight pages
    client.step()
    client.submit(PROMPT, id="large", max_new_tokens=49, priority=1)
    for number in range(30):
        client.submit(PROMPT[:3], id=str(number), max_new_tokens=2)
    client.run()
    assert [reply.reason for reply in client.replies.values()] == ["length"] * 32
    assert [name for name, _ in client.replies].index("large") == 1 + MOST_PASSED


def test_samples_count_as_rows_and_pages(model: LanguageModel) -> None:
    client = Client(model, EngineOptions(max_rows=4, num_pages=60, page_size=4, cache_bytes=0, prefill_tokens=4))
    client.submit(id="a", num_samples=3)
    client.submit(id="b", num_samples=2)
    client.step()
    assert client.engine.metrics().waiting == 1 and client.engine.rows.num_free == 1
    client.run()
    assert len(client.replies) == 5


# -- the end, before its time


def test_cancelled_at_any_moment(model: LanguageModel) -> None:
    for moment in range(9):
        client = Client(model, EngineOptions(max_rows=2, num_pages=40, page_size=4, prefill_tokens=4, cache_bytes=0))
        client.submit(id="gone", num_samples=2)
        client.submit(id="other", temperature=1.0, seed=1)
        client.submit(id="waiting")
        for _ in range(moment):
            client.step()
        client.engine.cancel("gone")
        client.engine.cancel("waiting")
        client.engine.cancel("unknown")
        client.run()
        gone = [client.replies["gone", index] for index in range(2)]
        if moment < 7:
            assert [reply.reason for reply in gone] == ["cancelled"] * 2
        assert gone[0].usage.completion_tokens == len(gone[0].ids) < 6 or moment >= 7
        assert client.replies["waiting", 0].reason == "cancelled" or moment >= 7
        expected = alone(model, Request(PROMPT, GenerationOptions(temperature=1.0, seed=1, max_new_tokens=6)))
        assert tuple(client.replies["other", 0].ids) == expected.token_ids
        assert client.engine.pool.pages.num_free == 39


def test_deadlines(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("statespan.serving.job.time.monotonic", lambda: now[0])
    client = Client(model, EngineOptions(max_rows=1, num_pages=40))
    client.submit(id="late", deadline_s=5, max_new_tokens=50)
    client.submit(id="never begun", deadline_s=4)
    client.submit(id="patient", deadline_s=1000)
    for _ in range(3):
        client.step()
        now[0] += 1
    now[0] += 3
    client.run()
    late, never = client.replies["late", 0], client.replies["never begun", 0]
    assert (late.reason, len(late.ids)) == ("deadline", 3)
    assert (never.reason, never.ids, never.usage.queue_s) == ("deadline", [], pytest.approx(6))
    assert client.replies["patient", 0].reason == "length"
    assert late.usage.total_s == pytest.approx(6) and late.usage.queue_s == 0


def test_logits_that_are_no_numbers_end_one_request(model: LanguageModel) -> None:
    client = Client(model)
    decode = client.engine.runner.decode

    def broken(ids: list[int]) -> Tensor:
        logits = decode(ids).clone()
        for row, sample in enumerate(client.engine.rows.active):
            if sample.job.request.id == "bad" and client.engine.pool.num_tokens[row] == len(PROMPT) + 2:
                logits[row] = torch.nan
        return logits

    client.engine.runner.decode = broken
    client.submit(id="bad", temperature=1.0, seed=1)
    good = client.submit(id="good", temperature=1.0, seed=1)
    client.run()
    bad = client.replies["bad", 0]
    assert (bad.reason, len(bad.ids)) == ("error", 2)
    assert "new token 2" in bad.events[-1].error and "NaN" in bad.events[-1].error
    assert tuple(client.replies["good", 0].ids) == alone(model, good).token_ids


@pytest.mark.parametrize("where", ["absorb", "decode", "snapshot"])
def test_an_exception_ends_the_requests_of_its_step(
    model: LanguageModel, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(model, EngineOptions(max_rows=4, num_pages=120, page_size=4))
    owner: Any = client.engine.pool if where == "snapshot" else client.engine.runner
    works = getattr(owner, where)

    def fails(argument: Any) -> Any:
        setattr(owner, where, works)
        raise RuntimeError("the device is tired\nat length")

    setattr(owner, where, fails)
    client.submit(id="a")
    client.submit(id="b", num_samples=2)
    with caplog.at_level(logging.CRITICAL):
        client.step()
    for reply in client.replies.values():
        assert (reply.reason, reply.events[-1].error) == ("error", "RuntimeError: the device is tired")
    assert set(client.replies) == {("a", 0), ("b", 0), ("b", 1)}
    assert client.engine.idle and client.engine.metrics().failures == 1
    after = client.submit(id="a", temperature=1.0, seed=4)
    client.replies.clear()
    client.run()
    assert tuple(client.replies["a", 0].ids) == alone(model, after).token_ids


def test_a_constraint_that_fails_ends_its_own_request(model: LanguageModel) -> None:
    class Broken:
        finished = False

        def mask(self) -> Tensor:
            return torch.ones(61, dtype=torch.bool)

        def accept(self, token_id: int) -> None:
            raise ValueError("no such rule")

        def fork(self) -> "Broken":
            return self

    client = Client(model)
    client.submit(id="bad", constraint=Broken())
    good = client.submit(id="good")
    client.run()
    assert client.replies["bad", 0].events[-1].error == "ValueError: no such rule"
    assert tuple(client.replies["good", 0].ids) == alone(model, good).token_ids


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (3, 61)}, "token id 61 of the prompt is out of range"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"num_samples": 0}, "num_samples must be 1 to 4"),
        ({"num_samples": 5}, "num_samples must be 1 to 4"),
        ({"max_new_tokens": 10_000}, "10000 new ones .* need 2503 pages of 4 tokens; the engine has 119"),
        ({"stop": "x"}, "stop strings need a tokenizer"),
        ({"return_state": True}, "return_state"),
        ({"logit_bias": {61: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ],
)
def test_refused(model: LanguageModel, keywords: dict[str, Any], message: str) -> None:
    client = Client(model)
    with pytest.raises(RequestRefused, match=message):
        client.submit(**keywords)
    assert client.engine.idle
    client.engine.check()


def test_the_queue_has_an_end(model: LanguageModel) -> None:
    client = Client(model, EngineOptions(max_rows=1, num_pages=40, max_waiting=2))
    client.submit(id="a")
    client.step()
    client.submit(id="b")
    with pytest.raises(RequestRefused, match="in use"):
        client.submit(id="a")
    client.submit(id="c")
    with pytest.raises(QueueFull, match="2 requests wait already"):
        client.submit(id="d")
    client.run()
    client.submit(id="a")


def test_closing_gives_everything_back(model: LanguageModel) -> None:
    client = Client(model)
    client.submit(id="a", max_new_tokens=50)
    client.submit(id="b")
    client.step()
    client.engine.close()
    client.engine.close()
    assert client.engine.pool.pages.num_free == client.engine.pool.pages.num_pages - 1
    with pytest.raises(RequestRefused, match="closed"):
        client.submit(id="c")


def test_embeddings(family: LanguageModel) -> None:
    client = Client(family)
    client.submit(id="beside", max_new_tokens=30)
    client.step()
    prompts = [PROMPT, PROMPT[:1], PROMPT * 4]
    found = client.engine.embed(prompts)
    heads: list[Tensor] = []
    normed = family.normed

    for prompt in prompts:
        with torch.no_grad():
            hidden = family.embedding(torch.tensor([prompt], device=family.device)).to(family.stream_dtype)
            heads.append(normed(family.backbone(hidden, None, None)[0])[0, -1].float())
    torch.testing.assert_close(found, torch.stack(heads).cpu(), atol=1e-4, rtol=1e-4)
    client.engine.check()
    with pytest.raises(RequestRefused, match="empty"):
        client.engine.embed([()])
    client.run()


# -- any schedule

LENGTHS = st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 30])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), LENGTHS, st.integers(0, 3), st.integers(1, 9), st.integers(1, 2)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
        st.tuples(st.just("again"), st.integers(0, 99)),
    ),
    min_size=3,
    max_size=16,
)
MEMORY = st.sampled_from(
    [
        {"num_pages": 120, "page_size": 4},
        {"num_pages": 24, "page_size": 4},
        {"num_pages": 46, "page_size": 1},
        {"num_pages": 8, "page_size": 16, "max_rows": 2},
        {"num_pages": 60, "page_size": 4, "cache_bytes": 12_000, "spill_bytes": 30_000},
        {"num_pages": 60, "page_size": 4, "cache_bytes": 0},
        {"num_pages": 60, "page_size": 4, "num_drafts": 3},
    ]
)


@pytest.fixture(scope="module")
def expected(model: LanguageModel) -> Iterator[Callable[[Request, int], tuple[int, ...]]]:
    """What `generate` gives, remembered."""
    known: dict[Any, tuple[int, ...]] = {}

    def lookup(request: Request, index: int) -> tuple[int, ...]:
        key = (request.prompt, request.options, index)
        if key not in known:
            known[key] = alone(model, request, index).token_ids
        return known[key]

    yield lookup


@settings(max_examples=150)
@given(ACTIONS, MEMORY, st.sampled_from([1, 3, 7, 64]), st.sampled_from([2, 8, 100]), st.booleans())
def test_any_schedule_gives_the_same_tokens_and_leaks_nothing(
    model: LanguageModel,
    expected: Callable[[Request, int], tuple[int, ...]],
    actions: list[tuple[Any, ...]],
    memory: dict[str, Any],
    prefill_tokens: int,
    interval: int,
    ahead: bool,
) -> None:
    """Batched equals alone, prefix-cached equals fresh, chunked equals whole, in any order and memory."""
    options = {"max_rows": 3, "prefill_tokens": prefill_tokens, "snapshot_interval": interval} | memory
    client = Client(model, EngineOptions(**options), ahead=ahead and "num_drafts" not in memory)
    requests: list[Request] = []
    cancelled: set[str] = set()

    def submit(prompt: tuple[int, ...], seed: int, count: int, samples: int) -> None:
        way = {"temperature": 0} if seed == 0 else {"temperature": 1.0, "top_p": 0.9, "seed": seed}
        try:
            requests.append(
                client.submit(prompt, id=str(len(requests)), max_new_tokens=count, num_samples=samples, **way)
            )
        except RequestRefused as error:
            assert "pages" in str(error)

    for action, *numbers in actions:
        if action == "submit":
            length, family, count, samples = numbers
            start = (PROMPT * 3)[: max(1, length - 2)]
            submit((*start, family, 50 + family)[:length] if family else (PROMPT * 3)[:length], family, count, samples)
        elif action == "step":
            for _ in range(numbers[0]):
                client.step()
        elif action == "cancel" and requests:
            request = requests[numbers[0] % len(requests)]
            client.engine.cancel(request.id)
            cancelled.add(request.id)
        elif action == "again" and requests:
            request = requests[numbers[0] % len(requests)]
            reply = client.replies.get((request.id, 0), Reply()).ids
            submit(((*request.prompt, *reply, 9))[:40], 2, 3, 1)
    client.run()
    for request in requests:
        for index in range(request.num_samples):
            reply = client.replies[request.id, index]
            whole = expected(request, index)
            assert tuple(reply.ids) == whole[: len(reply.ids)]
            assert reply.reason == "length" or request.id in cancelled
            if reply.reason == "length":
                assert len(reply.ids) == len(whole)
    engine = client.engine
    assert len(engine.rows.active) == len(engine.rows.prefilling) == 0
    engine.close()
    assert engine.pool.pages.num_free == engine.pool.pages.num_pages - 1


def test_the_check_notices_a_leak(model: LanguageModel) -> None:
    client = Client(model)
    client.submit()
    client.step()
    client.engine.pool.pages.allocate(1)
    with pytest.raises(AssertionError, match="holders"):
        client.engine.check()
    client = Client(model)
    client.engine.runner.prefill([Chunk(2, (1, 2))])
    with pytest.raises(AssertionError, match="row 2 leaks"):
        client.engine.check()
