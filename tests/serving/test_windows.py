"""A row of a sliding window is promised what it can hold at once, and finds it on its way, whatever runs beside it."""

import random

import pytest
import torch

import statespan
from statespan.generation import GenerationOptions
from statespan.generation.prompt_lookup import TextIndex
from statespan.models.language_model import LanguageModel
from statespan.serving.engine import Engine
from statespan.serving.options import EngineOptions
from statespan.serving.page_pool import PagePool
from statespan.serving.request import Request, RequestRefused
from statespan.serving.row_pages import RowPages

PAGE = 4


def request_of(chance: random.Random, number: int) -> Request:
    length, count = chance.choice([3, 20, 35, 40]), chance.randrange(1, 24)
    prompt = tuple(range(1, 1 + min(length, 30))) + tuple(chance.randrange(61) for _ in range(max(0, length - 30)))
    way = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
    options = GenerationOptions(max_new_tokens=count, ignore_eos=True, **way)
    return Request(prompt, options, id=str(number), num_samples=chance.choice([1, 1, 2]))


def alone(model: LanguageModel, request: Request, index: int) -> tuple[int, ...]:
    options = {name: getattr(request.options, name) for name in GenerationOptions.__dataclass_fields__}
    if request.options.seed is not None:
        options["seed"] = request.options.seed + index
    return statespan.generate(model, list(request.prompt), **options).token_ids


def run(engine: Engine, cancelled: set[str] = frozenset()) -> tuple[dict[tuple[str, int], list[int]], int]:  # type: ignore[assignment]  # read only
    """What was said, and how many rows were decoded at once."""
    said: dict[tuple[str, int], list[int]] = {}
    most = steps = 0
    while not engine.idle:
        for event in engine.step():
            assert event.error is None
            said.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        engine.check()
        most, steps = max(most, len(engine.rows.active)), steps + 1
        assert steps < 2000
        if steps == 9:
            for name in cancelled:
                engine.cancel(name)
    return said, most


@pytest.mark.gpu
def test_long_requests_run_side_by_side(window: LanguageModel) -> None:
    """Each is as long as all pages together; of these a row of this window never holds more than 7."""
    engine = Engine(window, EngineOptions(max_rows=4, num_pages=30, page_size=PAGE, prefill_tokens=8, cache_bytes=0))
    requests = [Request(tuple(range(n, n + 20)), GenerationOptions(max_new_tokens=96, temperature=0)) for n in range(4)]
    for request in requests:
        engine.submit(request)
    said, most = run(engine)
    assert most == 4
    for request in requests:
        assert tuple(said[request.id, 0]) == alone(window, request, 0)
    with pytest.raises(RequestRefused, match="30 pages of 4 tokens; the engine has 29"):
        engine.submit(Request(tuple(range(20)), GenerationOptions(max_new_tokens=97)))


def test_pages_left_behind_in_the_cache_make_room(window: LanguageModel) -> None:
    """Snapshots on the way take more pages than there are; a row finds what it was promised."""
    engine = Engine(window, EngineOptions(max_rows=2, num_pages=46, page_size=1, prefill_tokens=4, snapshot_interval=2))
    for start in range(3):
        prompt = tuple(range(start, start + 39))
        engine.submit(request := Request(prompt, GenerationOptions(max_new_tokens=5, temperature=0)))
        engine.step()  # it is admitted, with what had to be made free for it
        admitted = engine.metrics().cache_evictions
        said, _ = run(engine)
        assert tuple(said[request.id, 0]) == alone(window, request, 0)
    assert engine.metrics().cache_evictions > admitted


@pytest.mark.parametrize("page_size", [1, 4, 5])
def test_most_pages(page_size: int) -> None:
    """No row holds more on its way, and some hold nearly as many."""
    rows = RowPages(PagePool(100), page_size, 1, 1, 7, torch.device("cpu"))
    for at_once in (1, 2, 9):
        held = [rows.needed(done + count) - rows.gone(done) for done in range(60) for count in range(1, at_once + 1)]
        assert max(held) <= rows.most(200, at_once) <= max(held) + 2
        assert rows.most(3, at_once) == rows.needed(3)


@pytest.mark.parametrize("seed", range(12))
def test_any_schedule_gives_the_same_tokens(window: LanguageModel, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Forks, beginnings in common, cancellations, drafts and little memory, with the books checked each step."""
    chance = random.Random(seed)
    options = EngineOptions(
        max_rows=4,
        num_pages=chance.choice([16, 20, 40]),
        page_size=PAGE,
        prefill_tokens=chance.choice([3, 24, 24]),
        snapshot_interval=4,
        cache_bytes=seed % 2 << 20,
        num_drafts=chance.choice([0, 3]),
    )
    monkeypatch.setattr(TextIndex, "find", lambda self, text, count: (text[-1],) * chance.randrange(count + 1))
    engine = Engine(window, options)
    if options.num_drafts:
        engine.decode.pace = None
    requests = list[Request]()
    for number in range(10):
        request = request_of(chance, number)
        try:
            engine.submit(request)
            requests.append(request)
        except RequestRefused as error:
            assert "pages" in str(error)
    cancelled = {request.id for request in requests[1:2]}
    said, _ = run(engine, cancelled)
    for request in requests:
        for index in range(request.num_samples):
            found, whole = tuple(said.get((request.id, index), ())), alone(window, request, index)
            assert found == whole[: len(found)] and (len(found) == len(whole) or request.id in cancelled)
    engine.close()
    assert engine.pool.pages.num_free == options.num_pages - 1
