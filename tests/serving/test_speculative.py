"""Speculation in the engine is seen in the clock only: every request gives the tokens that it gives alone."""

import copy
import itertools
import random

import pytest
import torch

from statespan.generation import generate
from statespan.generation.options import GenerationOptions
from statespan.generation.prompt_lookup import TextIndex
from statespan.serving.decode import PlainDecode
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.speculative import SpeculativeDecode


@pytest.fixture
def model(family):
    return lively(family)


def lively(model):
    """A copy whose mixers weigh more, so that greedy text depends on the past and does not repeat at once."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
    return model


class Foreseen(TextIndex):
    """Drafts the known continuation of its text, with mistakes."""

    known: tuple[tuple[int, ...], ...] = ()
    chance = random.Random(0)

    def find(self, text, count):
        for whole in self.known:
            if whole[: len(text)] == tuple(text):
                ids = whole[len(text) : len(text) + self.chance.randint(0, count)]
                return tuple((token + 1) % 61 if self.chance.random() < 0.25 else token for token in ids)
        return ()


def engine_with_drafts(model, **options) -> Engine:
    engine = Engine(model, EngineOptions(page_size=4, num_pages=120, num_drafts=5, **options))
    assert isinstance(engine.decode, SpeculativeDecode)
    engine.decode.pace = None  # speculate always
    return engine


def run(engine: Engine, requests) -> dict[str, list[int]]:
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {f"{r.id}.{i}": [] for r in requests for i in range(r.num_samples)}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            tokens[f"{event.request_id}.{event.index}"] += event.token_ids
        engine.check()
    return tokens


def requests_and_truth(model, count: int = 7):
    chance = random.Random(1)
    requests, truth = [], {}
    for number in range(count):
        prompt = tuple(chance.randrange(61) for _ in range(chance.randrange(1, 20)))
        options = {"max_new_tokens": chance.randrange(2, 40), "ignore_eos": True, "seed": number}
        options |= [{"temperature": 0}, {"temperature": 0.8, "top_k": 9}, {"repetition_penalty": 1.5}][number % 3]
        requests.append(Request(prompt, GenerationOptions(**options), id=str(number)))
        truth[f"{number}.0"] = list(generate(model, list(prompt), **options).token_ids)
    return requests, truth


def test_tokens_are_those_of_each_request_alone(model, monkeypatch):
    requests, truth = requests_and_truth(model)
    monkeypatch.setattr("statespan.serving.drafters.TextIndex", Foreseen)
    Foreseen.known = tuple((*r.prompt, *truth[f"{r.id}.0"]) for r in requests)
    engine = engine_with_drafts(model, max_rows=4)
    assert run(engine, requests) == truth
    report = engine.decode.report
    assert 10 < report.accepted < report.drafted
    assert engine.metrics().accepted_tokens == report.accepted and engine.metrics().drafted_tokens == report.drafted


def test_the_prefix_cache_gets_true_states(model, monkeypatch):
    """The next turn starts from what a reply left behind, also where the row lagged or ran beyond the end."""
    monkeypatch.setattr("statespan.serving.drafters.TextIndex", Foreseen)
    for number in range(6):
        prompt = [7 + number, 3, 9, 4]
        first = generate(model, prompt, max_new_tokens=24, temperature=0, ignore_eos=True).token_ids
        Foreseen.known, Foreseen.chance = ((*prompt, *first),), random.Random(number)
        engine = engine_with_drafts(model)
        stop = first[10 + number]
        options = GenerationOptions(max_new_tokens=24, temperature=0, ignore_eos=True, stop_token_ids=(stop,))
        reply = run(engine, [Request(tuple(prompt), options, id="a")])["a.0"]
        assert reply == list(first[: first.index(stop) + 1])
        second = (*prompt, *reply, 5, 6)
        want = generate(model, list(second), max_new_tokens=8, temperature=0, ignore_eos=True).token_ids
        options = GenerationOptions(max_new_tokens=8, temperature=0, ignore_eos=True)
        assert run(engine, [Request(second, options, id="b")])["b.0"] == list(want)


def test_samples_of_one_prompt(hybrid, monkeypatch):
    model, options = lively(hybrid), {"max_new_tokens": 20, "ignore_eos": True, "temperature": 0.9}
    texts = [generate(model, [4, 5, 6], seed=8 + index, **options).token_ids for index in range(3)]
    monkeypatch.setattr("statespan.serving.drafters.TextIndex", Foreseen)
    Foreseen.known = tuple((4, 5, 6, *text) for text in texts)
    found = run(
        engine_with_drafts(model), [Request((4, 5, 6), GenerationOptions(seed=8, **options), id="n", num_samples=3)]
    )
    assert [tuple(found[f"n.{index}"]) for index in range(3)] == texts


def test_lookup_and_pace_in_earnest(hybrid):
    """Repeating text through the real look-up; both ways run, and the tokens stay."""
    model = lively(hybrid)
    prompt = tuple([3, 1, 4, 1, 5, 9, 2, 6] * 4)
    want = generate(model, list(prompt), max_new_tokens=90, temperature=0, ignore_eos=True).token_ids
    engine = Engine(model, EngineOptions(num_pages=40, num_drafts=4))
    assert isinstance(engine.decode, SpeculativeDecode)
    engine.decode.clock = itertools.count().__next__  # all steps take as long
    options = GenerationOptions(max_new_tokens=90, temperature=0, ignore_eos=True)
    assert run(engine, [Request(prompt, options, id="r")])["r.0"] == list(want)
    report = engine.decode.report
    assert report.verify_steps > 0 and report.plain_steps > 0


@pytest.mark.parametrize(("cost", "longest"), [(1.5, 220.0), (12.0, 330.0)])
def test_it_runs_where_it_is_faster(hybrid, monkeypatch, cost, longest):
    """By a made-up clock: a plain step takes 1, a verify step so much, and drafts are right three times of four.

    Plain steps alone would take 300.
    """
    model, options = lively(hybrid), {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
    texts = [generate(model, [start, 5], **options).token_ids for start in (3, 4)]
    monkeypatch.setattr("statespan.serving.drafters.TextIndex", Foreseen)
    Foreseen.known, Foreseen.chance = tuple((3 + row, 5, *text) for row, text in enumerate(texts)), random.Random(0)
    engine, now = Engine(model, EngineOptions(page_size=4, num_pages=400, num_drafts=5)), [0.0]
    decode, plain, verified = engine.decode, PlainDecode.__call__, SpeculativeDecode._verified
    assert isinstance(decode, SpeculativeDecode)
    decode.clock = lambda: now[0]

    def timed(step, seconds):
        def run(*arguments, **keywords):
            now[0] += seconds
            return step(*arguments, **keywords)

        return run

    monkeypatch.setattr(PlainDecode, "__call__", timed(plain, 1.0))
    monkeypatch.setattr(SpeculativeDecode, "_verified", timed(verified, cost))
    requests = [Request((3 + row, 5), GenerationOptions(**options), id=str(row)) for row in range(2)]
    assert run(engine, requests) == {f"{row}.0": list(text) for row, text in enumerate(texts)}
    assert decode.report.verify_steps > 0 and now[0] <= longest


def test_cancelled_rows_leave_the_others_alone(model, monkeypatch):
    requests, truth = requests_and_truth(model, 6)
    monkeypatch.setattr("statespan.serving.drafters.TextIndex", Foreseen)
    Foreseen.known = tuple((*r.prompt, *truth[f"{r.id}.0"]) for r in requests)
    engine = engine_with_drafts(model, max_rows=6)
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {name: [] for name in truth}
    steps = 0
    while not engine.idle:
        for event in engine.step():
            tokens[f"{event.request_id}.0"] += event.token_ids
        steps += 1
        if steps == 3:
            engine.cancel("1")
        engine.check()
    for name, want in truth.items():
        assert tokens[name] == (want if name != "1.0" else want[: len(tokens[name])])
