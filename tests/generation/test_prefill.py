"""Prompts on a GPU by graphs that are kept: the same tokens as on the CPU, whatever the length and the call before."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from statespan.generation import generate, prefill
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def prompt(length: int, first: int = 2) -> list[int]:
    return [2 + (first + 7 * place) % 50 for place in range(length)]


def tokens(model: LanguageModel, prompts: list[list[int]], **options: object) -> list[tuple[int, ...]]:
    return [found.token_ids for found in generate(model, prompts, max_new_tokens=8, temperature=0, **options)]


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_every_length_and_call_gives_the_tokens_of_the_cpu(name: str, tiny: Callable[[str], LanguageModel]) -> None:
    on_gpu, model = tiny(name).cuda(), tiny(name)
    for lengths in ([5], [64], [70], [5, 40, 130], [64, 64], [200]):
        prompts = [prompt(length, index) for index, length in enumerate(lengths)]
        expected = tokens(model, prompts)
        for chunk in (None, None, None, 64, 50):
            assert tokens(on_gpu, prompts, prefill_chunk_size=chunk) == expected
    assert 1 <= len(prefill._idle.waiting(on_gpu)) <= prefill.KEPT


def test_continuing_from_a_state(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1").cuda()
    for _ in range(3):
        whole = generate(model, prompt(90), max_new_tokens=8, temperature=0)
        first = generate(model, prompt(90)[:70], max_new_tokens=0, return_state=True)
        for _ in range(2):  # it is not changed
            rest = generate(model, prompt(90)[70:], state=first.state, max_new_tokens=8, temperature=0)
            assert rest.token_ids == whole.token_ids


def test_graphs_are_kept_and_read_new_weights(
    tiny: Callable[[str], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mamba1").cuda()
    for _ in range(3):
        before = tokens(model, [prompt(70)])
    (kept,) = prefill._idle.waiting(model)
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.add_(1.0)
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = tokens(model, [prompt(70)])
    assert prefill._idle.waiting(model) == [kept]
    monkeypatch.setattr(Prefiller, "serves", staticmethod(lambda rows, count: False))
    assert before != after
    assert after == tokens(model, [prompt(70)])
    gone = weakref.ref(model)
    del model, kept
    gc.collect()
    assert gone() is None
