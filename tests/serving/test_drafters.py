"""Drafting by models in the engine: rows that run ahead and are set back, and tokens that stay those of each alone."""

import copy
import dataclasses
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.errors import UserError
from statespan.generation import DraftModel, SubwordDrafter, generate
from statespan.generation.options import GenerationOptions
from statespan.generation.sampling import Sampling
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.draft_rows import DraftRows
from statespan.serving.drafters import ModelDrafter, drafter_of
from statespan.serving.engine import Engine
from statespan.serving.job import Job, Sample
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.speculative import SpeculativeDecode

GREEDY = {
    "temperature": 0,
    "top_k": None,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
TEXT = "the cat sat on the mat, the dog sat on the cat; and naïve cats sat. " * 3


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(model, noise: float = 0.0):
    """A copy whose greedy text depends on the past; with noise, one that agrees with it now and then."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
            if noise and parameter.numel() > 1:
                spread = noise * parameter.std()
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * spread)
    return model


def requests_of(chance: random.Random, count: int, prefix: str = "") -> list[Request]:
    """Greedy, sampled and penalised ones."""
    requests: list[Request] = []
    for number in range(count):
        prompt = tuple(chance.randrange(61) for _ in range(chance.randrange(1, 20)))
        options = {"max_new_tokens": chance.randrange(1, 30), "ignore_eos": True, "seed": chance.randrange(100)}
        options |= [
            {"temperature": 0},
            {"temperature": 0.8, "top_k": 9},
            {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": -0.3},
        ][number % 3]
        requests.append(Request(prompt, GenerationOptions(**options), id=f"{prefix}{number}"))
    return requests


def alone(model, request: Request, index: int = 0) -> list[int]:
    options = {name: getattr(request.options, name) for name in Sampling.__dataclass_fields__}
    options |= {"max_new_tokens": request.options.max_new_tokens, "seed": (request.options.seed or 0) + index}
    return list(generate(model, list(request.prompt), ignore_eos=True, **options).token_ids)


def always(engine: Engine) -> SpeculativeDecode:
    assert isinstance(engine.decode, SpeculativeDecode)
    engine.decode.pace = None  # speculate always
    return engine.decode


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    for request in requests:
        engine.submit(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
        engine.check()
    return tokens


def test_tokens_are_those_of_each_request_alone(family):
    """A draft model of the same family, right now and then; more requests than rows, prompts read in small pieces."""
    model, requests = lively(family), requests_of(random.Random(1), 9)
    options = EngineOptions(page_size=4, num_pages=120, num_drafts=5, max_rows=4, prefill_tokens=7)
    engine = Engine(model, options, draft=lively(family, 0.05))
    report = always(engine).report
    assert run(engine, requests) == {request.id: alone(model, request) for request in requests}
    assert 5 < report.accepted < report.drafted


def test_warming_up_leaves_nothing(family):
    """Graphs are captured over rows that nobody has, of both pools."""
    model, requests = lively(family), requests_of(random.Random(2), 5)
    options = EngineOptions(page_size=4, num_pages=120, num_drafts=3, max_rows=3)
    engine = Engine(model, options, draft=lively(family, 0.05))
    engine.warm_up()
    engine.check()
    always(engine)
    assert run(engine, requests) == {request.id: alone(model, request) for request in requests}


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_greedy_drafts_in_one_piece(family, noise, monkeypatch):
    """A GPU's form: all steps of a run and the states after each at once, also where fewer drafts are wanted."""
    chance, steps = random.Random(3), Counter[int]()
    requests = [
        Request(request.prompt, dataclasses.replace(request.options, **GREEDY), id=request.id)
        for request in requests_of(chance, 9)
    ]
    model = lively(family)
    options = EngineOptions(page_size=4, num_pages=120, num_drafts=5, max_rows=4, prefill_tokens=7)
    engine = Engine(model, options, draft=lively(family, noise))
    decode = always(engine)
    rows = decode.drafter._rows
    rows._in_graphs, made = True, DraftRows.run_greedily
    run_greedily = lambda self, ids, count: (steps.update([count]), made(self, ids, count))[1]  # noqa: E731  # counts
    monkeypatch.setattr(DraftRows, "run_greedily", run_greedily)
    assert run(engine, requests) == {request.id: alone(model, request) for request in requests}
    assert set(steps) == {6} and (decode.report.acceptance == 1 if noise == 0 else 0 < decode.report.acceptance < 1)


def test_a_draft_of_another_family(hybrid):
    config = hybrid.config.replace(layers=(LayerSpec.from_text("mamba1"),))
    model, requests = lively(hybrid), requests_of(random.Random(2), 6)
    engine = Engine(
        model,
        EngineOptions(page_size=4, num_pages=120, num_drafts=3),
        draft=build(config, seed=4, device=hybrid.device),
    )
    always(engine)
    assert run(engine, requests) == {request.id: alone(model, request) for request in requests}


def test_a_draft_that_knows_the_model_is_always_right(hybrid):
    model = lively(hybrid)
    engine = Engine(model, EngineOptions(page_size=4, num_pages=120, num_drafts=4), draft=copy.deepcopy(model))
    decode = always(engine)
    options = [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
    requests = [
        Request((5, 6, 7), GenerationOptions(max_new_tokens=40, ignore_eos=True, seed=3, **some), id=str(place))
        for place, some in enumerate(options)
    ]
    run(engine, requests)
    assert decode.report.acceptance == 1 and decode.report.verify_steps == 8 and decode.report.plain_steps == 0


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32))
def test_any_schedule(hybrid, seed):
    """Requests come, are cancelled and go on in turns, and speculation turns off and on."""
    chance = random.Random(seed)
    model = lively(hybrid)
    options = EngineOptions(
        page_size=chance.choice([1, 4]),
        num_pages=250,
        num_drafts=chance.randint(1, 6),
        max_rows=chance.randint(1, 5),
        prefill_tokens=chance.choice([3, 50]),
        cache_bytes=chance.choice([0, 1 << 20]),
    )
    engine = Engine(model, options, draft=lively(hybrid, 0.05))
    decode = always(engine)
    drafter, asked = decode.drafter, chance.random()
    nothing = Counter[str]()

    class Sometimes:
        def propose(self, samples, counts):
            if chance.random() < asked:
                return drafter.propose(samples, counts)
            nothing["steps"] += 1
            return [()] * len(samples)

    decode.drafter = Sometimes()
    requests = requests_of(chance, chance.randint(1, 7))
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    left, cancelled = list(requests), set[str]()
    while left or not engine.idle:
        if left and chance.random() < 0.4:
            engine.submit(left.pop())
        if chance.random() < 0.05:
            cancelled.add(chance.choice(requests).id)
            engine.cancel(max(cancelled))
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
        engine.check()
    for request in requests:
        want = alone(model, request)
        assert tokens[request.id] == (want if request.id not in cancelled else want[: len(tokens[request.id])])


def test_samples_without_pages_in_the_draft_model_go_on_without_drafts(family):
    model, draft = lively(family), lively(family)
    engine = Engine(model, EngineOptions(page_size=4, num_pages=120, num_drafts=4), draft=draft)
    decode, requests = always(engine), requests_of(random.Random(3), 5)
    rows = DraftRows(draft, num_rows=64, num_pages=8, page_size=4, prefill_tokens=100)
    decode.drafter = ModelDrafter(rows, 4)
    assert run(engine, requests) == {request.id: alone(model, request) for request in requests}
    rows.follow([], {})
    assert rows.pool.pages.num_free == 7 and not any(rows.pool.num_tokens)


def test_logit_bias_reaches_the_draft_model(hybrid):
    model = lively(hybrid)
    engine = Engine(model, EngineOptions(num_pages=50, num_drafts=4), draft=copy.deepcopy(model))
    decode = always(engine)
    options = GenerationOptions(max_new_tokens=20, temperature=0, ignore_eos=True)
    assert run(engine, [Request((1, 2), options, id="b", logit_bias={17: 1e6})]) == {"b": [17] * 20}
    assert decode.report.acceptance == 1


def samples_of(model, prompts) -> list[Sample]:
    """As a decode step gets them."""
    requests = [Request(tuple(p), GenerationOptions(max_new_tokens=50, temperature=0)) for p in prompts]
    return [Sample(Job(request, 0, 0), 0, None, model) for request in requests]


def test_drafts_are_those_of_generate(family):
    """The peer drafts for one batch of `generate`; texts of unequal length, grown by what was never drafted.

    The last row comes late, when pages that a sliding window has passed could be thought to be free.
    """
    model, draft = lively(family), lively(family, 0.2)
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
    samples, counts = samples_of(model, prompts), [4, 3, 1]
    ours = drafter_of(draft, model, EngineOptions(num_drafts=4, page_size=1), num_pages=400)
    peer = DraftModel(draft).begin(model, Sampling(temperature=0), [0, 1, 2])
    for turn in range(5):
        here = slice(3 if turn > 1 else 2)
        found = ours.propose(samples[here], counts[here])
        want = [one.ids for one in peer.propose([sample.token_ids for sample in samples], counts)]
        assert found == want[here]
        for sample, ids in zip(samples, want, strict=True):  # part of them comes true
            sample.token_ids += [*ids[:turn], (turn * 7) % 61]


def byte_pairs(vocab_size: int = 300) -> FileTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return FileTokenizer(backend)


@pytest.fixture(scope="module")
def byte_and_subword():
    config = ModelConfig(
        vocab_size=256, hidden_size=24, layers=tuple(map(LayerSpec.from_text, ("mamba1", "attention")))
    )
    target, draft = lively(build(config, seed=1).eval()), lively(build(config.replace(vocab_size=300), seed=2).eval())
    target.tokenizer, draft.tokenizer = ByteTokenizer(), byte_pairs()
    return target, draft


def test_subword_drafts_are_those_of_generate(byte_and_subword):
    target, draft = byte_and_subword
    samples = samples_of(target, [b"the cat s", b"on the mat, the dog", b"na\xc3", b"", b" and", b"x" * 60])
    samples[3].token_ids = list(b"t")
    counts = [8, 5, 8, 3, 1, 8]
    ours = drafter_of(draft, target, EngineOptions(num_drafts=8), num_pages=200)
    peer = SubwordDrafter(draft).begin(target, Sampling(temperature=0), range(6))
    for turn in range(5):
        found = ours.propose(samples, counts)
        want = [one.ids for one in peer.propose([sample.token_ids for sample in samples], counts)]
        assert found[:5] == want[:5] and any(found)
        assert found[5] == () or turn  # a word too long to be gone on with
        for sample, ids in zip(samples, found, strict=True):
            sample.token_ids += [*ids[: 2 * turn], *b" sat"[: turn + 1]]


def test_subword_drafting_keeps_the_bytes(byte_and_subword):
    target, draft = byte_and_subword
    engine = Engine(target, EngineOptions(num_pages=100, num_drafts=8, max_rows=3, prefill_tokens=5), draft=draft)
    decode = always(engine)
    requests = [
        Request(tuple(TEXT[place : place + 9].encode()), GenerationOptions(max_new_tokens=30, **some), id=str(place))
        for place, some in enumerate([{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"temperature": 0}])
    ]
    assert run(engine, requests) == {
        request.id: list(
            generate(
                target,
                list(request.prompt),
                max_new_tokens=30,
                temperature=request.options.temperature,
                top_p=request.options.top_p,
                seed=request.options.seed,
            ).token_ids
        )
        for request in requests
    }
    assert decode.report.drafted > 5


def test_models_that_do_not_fit_are_refused(hybrid, byte_and_subword):
    target, draft = byte_and_subword
    with pytest.raises(UserError, match="has 300 tokens and the model 61; they must share a vocabulary"):
        Engine(hybrid, EngineOptions(num_pages=9, num_drafts=2), draft=draft)
    nameless = copy.copy(draft)
    nameless.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        Engine(target, EngineOptions(num_pages=9, num_drafts=2), draft=nameless)
