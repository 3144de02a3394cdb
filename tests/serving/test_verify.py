"""Verifying with the state after each token kept, which is a GPU's way; here with the layers' own forward in it."""

import random

import pytest

from statespan.generation import GenerationOptions, generate
from statespan.generation.pace import Kind
from statespan.models.language_model import LanguageModel
from statespan.serving.decode import PlainDecode
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.speculative import SpeculativeDecode

NUM_DRAFTS = 4


class Guesses:
    """Drafts that come true in part: what `generate` will say, now and then another token; and of any number."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], seed: int) -> None:
        self._texts, self._chance = texts, random.Random(seed)

    def propose(self, samples, counts):
        drafts = []
        for sample, count in zip(samples, counts, strict=True):
            prompt = sample.job.request.prompt
            rest = self._texts[prompt][len(sample.token_ids) - len(prompt) :][: self._chance.randrange(count + 1)]
            drafts.append(tuple(token if self._chance.random() < 0.7 else (token + 1) % 61 for token in rest))
        return drafts

    def warm_up(self):
        pass


class Whims:
    """Speculation now and then, with plain steps ahead between."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def speculates(self, num_rows: int) -> bool:
        return self._chance.random() < 0.5

    def note(self, num_rows: int, kind: Kind, seconds: float, tokens: int, *, steady: bool) -> None:
        pass


def has_steps(model: LanguageModel) -> bool:
    """Whether all layers take several tokens and keep the states."""
    kinds = {spec.mixer for spec in model.config.layers if spec.mixer is not None}
    return kinds <= {"mamba1", "mamba2"} or (
        kinds <= {"mamba1", "mamba2", "attention"} and not model.config.attention.conv_kernel
    )


@pytest.mark.parametrize(("page_size", "whims"), [(3, False), (16, True)])
def test_tokens_are_those_of_each_alone(family: LanguageModel, kept_states: None, page_size: int, whims: bool) -> None:
    chance = random.Random(page_size)
    ways = ({"temperature": 0}, {"temperature": 0.9, "top_p": 0.8}, {"repetition_penalty": 1.4, "top_k": 20})
    requests: list[Request] = []
    for number in range(7):
        prompt = (number, *(chance.randrange(61) for _ in range(chance.randrange(20))))
        options = {"max_new_tokens": chance.randrange(1, 24), "ignore_eos": True, "seed": number}
        requests.append(Request(prompt, GenerationOptions(**options, **ways[number % 3]), id=str(number), reuse=False))
    alone = {
        request.prompt: list(
            generate(
                family,
                list(request.prompt),
                **{name: getattr(request.options, name) for name in GenerationOptions.__dataclass_fields__},
            ).token_ids
        )
        for request in requests
    }
    options = EngineOptions(max_rows=3, num_pages=120, page_size=page_size, num_drafts=NUM_DRAFTS, prefill_tokens=16)
    engine = Engine(family, options)
    assert isinstance(engine.decode, SpeculativeDecode)
    plain = PlainDecode(engine.runner, family.config.vocab_size, family.device, ahead=True)
    decode = SpeculativeDecode(plain, engine.runner, num_drafts=NUM_DRAFTS, drafter=Guesses(alone, 0))
    decode.pace = Whims(page_size) if whims else None
    engine.use(decode)
    decode.warm_up()
    for request in requests:
        engine.submit(request)
    said: dict[str, list[int]] = {}
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            said.setdefault(event.request_id, []).extend(event.token_ids)
        engine.check()
    assert bool(decode._verify._graphs) == has_steps(family)
    assert said == {request.id: alone[request.prompt] for request in requests}
    report = decode.report
    assert 0.3 < report.acceptance < 1 and report.tokens > report.verify_steps and bool(report.plain_steps) >= whims
