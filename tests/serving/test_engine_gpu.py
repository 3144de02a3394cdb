"""The engine on a GPU: graphs and the step ahead give what `generate` gives, and no step waits in its middle."""

import random

import pytest
import torch

import statespan
from statespan.generation import GenerationOptions
from statespan.generation.sampling import Sampling, choose
from statespan.models.language_model import LanguageModel
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.request import Request
from statespan.serving.sampling import RowSampling, choose_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

WAYS = (
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=3.0, top_k=5),
    Sampling(top_p=0.4),
    Sampling(min_p=0.3),
    Sampling(top_k=20, top_p=0.8, min_p=0.05, temperature=1.7),
)


@pytest.mark.parametrize("vocab_size", [61, 50_277])
def test_rows_choose_as_one_alone(vocab_size: int) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        logits = 3 * torch.randn(len(WAYS), vocab_size, device="cuda")
        numbers = torch.rand(len(WAYS), dtype=torch.float64, device="cuda")
        ids, _ = choose_rows(logits, RowSampling.of(WAYS, vocab_size, "cuda"), numbers)
        for row, way in enumerate(WAYS):
            alone, _ = choose(logits[row : row + 1], way, None if way.greedy else numbers[row : row + 1])
            assert int(ids[row]) == int(alone[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_waits_in_the_middle_of_a_step(hybrid: LanguageModel, temperature: float) -> None:
    """Prompts, snapshots and decode steps are queued; the host waits for the tokens of the step before alone."""
    engine = Engine(hybrid, EngineOptions(max_rows=4, num_pages=200, page_size=16, prefill_tokens=64))
    way = GenerationOptions(max_new_tokens=40, temperature=temperature, top_p=0.9 if temperature else None, seed=1)
    submit = lambda name, length: engine.submit(Request(tuple(range(1, length)), way, id=name))  # noqa: E731  # thrice
    for mode in ("default", "error"):  # the first time kernels are compiled and graphs captured
        submit("a", 50)
        submit("b", 30)
        for _ in range(8):
            engine.step()
        submit("c", 40)
        try:
            torch.cuda.set_sync_debug_mode(mode)
            for _ in range(8):
                assert [event.error for event in engine.step() if event.error] == []
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while not engine.idle:
            engine.step()
    engine.close()


def test_many_requests_equal_generate(hybrid: LanguageModel) -> None:
    """Beginnings in common, forks, cancellations and second turns, with the books checked each step."""
    options = EngineOptions(
        max_rows=4, num_pages=200, page_size=16, prefill_tokens=64, snapshot_interval=16, cache_bytes=1 << 20,
        spill_bytes=1 << 22,
    )  # fmt: skip
    engine, drawn = Engine(hybrid, options), random.Random(0)
    engine.warm_up()
    engine.check()
    requests: list[Request] = []
    replies: dict[tuple[str, int], list[int]] = {}

    def submit(prompt: list[int]) -> None:
        number = len(requests)
        way = GenerationOptions(
            max_new_tokens=drawn.randrange(1, 16), temperature=drawn.choice([0, 1.0, 1.3]), seed=number,
            top_p=drawn.choice([None, 0.9]), top_k=drawn.choice([None, 20]),
            repetition_penalty=drawn.choice([1.0, 1.0, 1.5]),
        )  # fmt: skip
        requests.append(Request(tuple(prompt), way, id=str(number), num_samples=drawn.choice([1, 1, 2])))
        engine.submit(requests[-1])

    shared = [drawn.randrange(61) for _ in range(90)]
    for _ in range(10):
        tail = [drawn.randrange(61) for _ in range(drawn.randrange(9))]
        submit(shared[: drawn.choice([1, 2, 17, 33, 64, 90])] + tail)
    step = 0
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            replies.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        engine.check()
        step += 1
        if step in (5, 9):
            engine.cancel(str(step))
        if step == 12:
            for number in range(4):
                submit([*requests[number].prompt, *replies.get((str(number), 0), []), 3])
    for request in requests:
        for index in range(request.num_samples):
            way = {name: getattr(request.options, name) for name in GenerationOptions.__dataclass_fields__}
            whole = statespan.generate(hybrid, list(request.prompt), **way | {"seed": way["seed"] + index})
            found = tuple(replies[request.id, index])
            assert found == whole.token_ids[: len(found)]
            assert len(found) == len(whole.token_ids) or request.id in ("5", "9")
    engine.close()
    assert engine.pool.pages.num_free == engine.pool.pages.num_pages - 1
