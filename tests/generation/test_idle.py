"""What waits between calls: taken once, good for weights where they lay, gone with the model."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from statespan.generation import PromptLookup, Speculation, generate, prefill, stepper, verifier
from statespan.generation import idle as idle_module
from statespan.generation.idle import Idle
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (idle_module, prefill):
        monkeypatch.setattr(module, "has_graphs", lambda model: True)


@pytest.fixture
def model(tiny: Callable[[str], LanguageModel]) -> LanguageModel:
    return tiny("mamba1")


class Graph:
    """A stand-in for what holds CUDA graphs."""


def test_a_thing_is_taken_once_and_comes_back(model: LanguageModel) -> None:
    idle: Idle[Graph] = Idle(4)
    first = idle.take(model, (1, "greedy"), Graph)
    second = idle.take(model, (1, "greedy"), Graph)
    assert first is not second and idle.waiting(model) == []
    idle.give_back(model, first)
    assert idle.take(model, (2, "greedy"), Graph) not in (first, second)  # of another form
    assert idle.take(model, (1, "greedy"), Graph) is first
    idle.give_back(model, second)
    idle.give_back(model, first)
    assert idle.waiting(model) == [second, first]
    assert idle.take(model, (1, "greedy"), Graph) is first  # the newest


def test_what_was_not_taken_or_is_back_does_not_wait_twice(model: LanguageModel) -> None:
    idle: Idle[Graph] = Idle(4)
    idle.give_back(model, Graph())
    assert idle.waiting(model) == []
    graph = idle.take(model, 1, Graph)
    idle.give_back(model, graph)
    idle.give_back(model, graph)
    assert idle.waiting(model) == [graph]
    assert idle.take(model, 1, Graph) is graph and idle.take(model, 1, Graph) is not graph


def test_the_oldest_leave(model: LanguageModel) -> None:
    idle: Idle[Graph] = Idle(2)
    graphs = [idle.take(model, form, Graph) for form in range(4)]
    gone = weakref.ref(graphs[0])
    for graph in graphs:
        idle.give_back(model, graph)
    assert idle.waiting(model) == graphs[2:]
    del graph, graphs
    assert gone() is None


def test_training_in_place_keeps_and_moved_weights_drop(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1")
    idle: Idle[Graph] = Idle(4)
    graph = idle.take(model, 1, Graph)
    other = idle.take(model, 2, Graph)
    idle.give_back(model, graph)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert idle.take(model, 1, Graph) is graph
    idle.give_back(model, graph)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    idle.give_back(model, other)  # it was taken before they moved
    assert idle.waiting(model) == [graph, other]
    assert idle.take(model, 2, Graph) is not other
    assert idle.waiting(model) == []


def test_things_go_with_the_model(tiny: Callable[[str], LanguageModel]) -> None:
    idle: Idle[Graph] = Idle(4)
    model = tiny("mamba1")
    graph = idle.take(model, 1, Graph)
    late = idle.take(model, 1, Graph)
    idle.give_back(model, graph)
    gone = weakref.ref(graph)
    del model, graph
    gc.collect()
    assert gone() is None
    idle.give_back(None, late)  # whose batch ended after the model


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 1, "repetition_penalty": 1.1}, {"speculation": True}])
@pytest.mark.parametrize("family", ["mamba1", "mamba2", "jamba"])
def test_weights_go_with_the_model_before_python_collects(
    family: str, options: dict[str, Any], tiny: Callable[[str], LanguageModel]
) -> None:
    """Nothing that waits for it is in a circle with itself: their memory would stay until Python looks for such."""
    if "speculation" in options:
        options = {"temperature": 0, "speculation": Speculation(PromptLookup(), adaptive=False)}
    model = tiny(family)
    generate(model, [5, 6, 5, 6], max_new_tokens=1)  # what is compiled or looked up once
    gone = weakref.ref(model.embedding.weight)
    gc.collect()
    gc.disable()
    try:
        generate(model, [5, 6, 5, 6], max_new_tokens=5, **options)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_none_is_made_each_time(model: LanguageModel) -> None:
    idle: Idle[Graph | None] = Idle(4)
    assert idle.take(model, 1, lambda: None) is None
    assert idle.take(model, 1, Graph) is not None


def test_threads_never_share_a_thing(model: LanguageModel) -> None:
    idle: Idle[Graph] = Idle(3)
    held: set[Graph] = set()
    wrong: list[Graph] = []

    def calls() -> None:
        for count in range(300):
            graph = idle.take(model, count % 2, Graph)
            if graph in held:
                wrong.append(graph)
            held.add(graph)
            held.discard(graph)
            idle.give_back(model, graph)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(idle.waiting(model)) <= 3


def test_giving_back_inside_take_waits_for_nobody(model: LanguageModel) -> None:
    """As when a batch is collected in the middle of it."""
    idle: Idle[Graph] = Idle(3)
    graph = idle.take(model, 1, Graph)
    with idle._lock:
        idle.give_back(model, graph)
    assert idle.waiting(model) == []
    idle.give_back(model, graph)  # it is lost, and not half there
    assert idle.waiting(model) == []


def test_calls_use_the_stepper_of_the_last_one(tiny: Callable[[str], LanguageModel]) -> None:
    """Steppers that say they are captured, as on a GPU: kept by size and sampling, and their tokens stay the same."""
    model, plain = tiny("mamba1"), tiny("mamba1")
    make = model.decoder

    def decoder(batch_size: int) -> object:
        found = make(batch_size)
        found.captures, found.captured = True, lambda run: run
        return found

    model.decoder = decoder  # type: ignore[method-assign,assignment]  # on this model alone
    for options in ({"temperature": 0}, {"temperature": 0}, {"seed": 3, "top_k": 5}, {"temperature": 0}):
        for prompts in ([[5, 9, 33]], [[5, 9], [7, 21, 40]]):
            wanted = generate(plain, prompts, max_new_tokens=6, **options)
            found = generate(model, prompts, max_new_tokens=6, **options)
            assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert sorted(one.batch_size for one in stepper._idle.waiting(model)) == [1, 1, 2, 2]
    assert stepper._idle.waiting(plain) == []  # nothing is captured there


def test_speculation_uses_the_forwards_of_the_last_call(
    tiny: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier.Verifier, "has_graphs", property(lambda self: True))
    model, plain, prompt = tiny("jamba"), tiny("jamba"), [5, 9, 33, 5, 9, 33, 5, 9]
    made: list[object] = []
    make = verifier.Forwards
    monkeypatch.setattr(verifier, "Forwards", lambda *parts: made.append(make(*parts)) or made[-1])
    for count in (1, 2, 1, 2):
        speculation = Speculation(PromptLookup(shortest=1), num_drafts=3, adaptive=False)
        found = generate(model, [prompt] * count, max_new_tokens=9, temperature=0, speculation=speculation)
        wanted = generate(plain, [prompt] * count, max_new_tokens=9, temperature=0)
        assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert len(made) == 2 and set(verifier._idle.waiting(model)) == set(made)


def test_prompts_use_the_chunks_of_the_last_call(tiny: Callable[[str], LanguageModel]) -> None:
    model, plain = tiny("mamba1"), tiny("mamba1")
    made: list[Prefiller] = []

    def prefiller(batch_size: int) -> Prefiller:
        made.append(Prefiller(model.embedding, model.backbone, model.stream_dtype, model.new_state(batch_size)))
        return made[-1]

    model.prefiller = prefiller  # type: ignore[method-assign]  # there is none on a CPU
    for length in (3, 70, 3, 131):
        for count in (1, 2):
            prompts = [[2 + (7 * place + row) % 50 for place in range(length + row)] for row in range(count)]
            found = generate(model, prompts, max_new_tokens=6, temperature=0)
            wanted = generate(plain, prompts, max_new_tokens=6, temperature=0)
            assert [each.token_ids for each in found] == [each.token_ids for each in wanted]
    assert len(made) == 2 and prefill._idle.waiting(model) == made
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    generate(model, [[5, 9]], max_new_tokens=1)
    assert prefill._idle.waiting(model) == made[2:] and len(made) == 3


def test_on_a_cpu_nothing_waits(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    idle: Idle[Graph] = Idle(3)
    graph = idle.take(model, 1, Graph)
    idle.give_back(model, graph)
    assert idle.waiting(model) == [] and idle.take(model, 1, Graph) is not graph
