"""Steps ahead of the tokens that are read, rows that stay in the batch after their end, and graphs on a GPU."""

import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from statespan.errors import UserError
from statespan.generation import generate, stepper
from statespan.generation.sampling import random_numbers
from statespan.models.language_model import LanguageModel

PROMPT = [5, 9, 33, 7, 21, 40, 2, 18]
PROMPTS = ([PROMPT], [PROMPT[:3], PROMPT, PROMPT[:5]], [PROMPT[: 1 + i % 7] for i in range(13)])
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "nucleus": {"temperature": 1.5, "top_p": 0.9, "seed": 3},
    "filters": {"top_k": 20, "min_p": 0.02, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 4},
    "stops": {"seed": 9, "stop_token_ids": list(range(8))},
    "log-probabilities": {"seed": 9, "stop_token_ids": list(range(8)), "logprobs": 2},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def as_on_a_gpu(model: LanguageModel) -> LanguageModel:
    """Its decoders say that they are captured; the steps run as they are."""
    plain = model.decoder

    def decoder(batch_size: int) -> Any:
        found = plain(batch_size)
        found.captures, found.captured = True, lambda run: run
        return found

    model.decoder = decoder
    return model


def check_equal(model: LanguageModel, other: LanguageModel, options: dict[str, Any], length: int = 30) -> None:
    """The same tokens, and states from which the same follows."""
    for prompts in PROMPTS:
        wanted = generate(model, prompts, max_new_tokens=length, return_state=True, **options)
        found = generate(other, prompts, max_new_tokens=length, **options)
        with_states = generate(other, prompts, max_new_tokens=length, return_state=True, **options)
        for one, two, three in zip(wanted, found, with_states, strict=True):
            assert one.token_ids == two.token_ids == three.token_ids
            assert one.finish_reason == two.finish_reason
        for row in {0, len(prompts) - 1}:
            first, second = (
                generate(of, [], state=results[row].state, max_new_tokens=5, temperature=0)
                for of, results in ((model, wanted), (other, with_states))
            )
            assert first.token_ids == second.token_ids


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["mamba1", "jamba"])
def test_running_ahead_changes_nothing(kind: str, options: str, tiny: Callable[[str], LanguageModel]) -> None:
    check_equal(tiny(kind), as_on_a_gpu(tiny(kind)), OPTIONS[options])


def test_it_does_run_ahead_and_not_too_far(tiny: Callable[[str], LanguageModel], monkeypatch: Any) -> None:
    steps: list[int] = []
    advance = stepper.Stepper.advance
    monkeypatch.setattr(stepper.Stepper, "advance", lambda self: (steps.append(1), advance(self)))
    model = as_on_a_gpu(tiny("mamba1"))
    events = iter(generate.__globals__["generate_stream"](model, PROMPT, max_new_tokens=4, temperature=0))
    launched = []
    for _ in events:
        launched.append(len(steps))
    assert launched == [0, 2, 3, 3]  # by the time each token is handed out


def test_ended_rows_stay_until_half_of_them_have(tiny: Callable[[str], LanguageModel], monkeypatch: Any) -> None:
    sizes: list[int] = []
    taken = stepper.take
    monkeypatch.setattr(
        "statespan.generation.batch.take",
        lambda model, size, sampling: (sizes.append(size), taken(model, size, sampling))[1],
    )
    model = as_on_a_gpu(tiny("jamba"))
    results = generate(model, PROMPTS[2], max_new_tokens=30, **OPTIONS["stops"])
    assert len({len(result.token_ids) for result in results}) > 4
    assert sizes[0] == 13 and all(2 * after <= before for before, after in pairwise(sizes))


def test_logits_that_are_not_finite_are_told_one_step_later(tiny: Callable[[str], LanguageModel]) -> None:
    model = as_on_a_gpu(tiny("mamba1"))
    with torch.no_grad():
        model.embedding.weight[33] = float("nan")
    with pytest.raises(UserError, match="prompt 1, new token 0: the largest logit is nan"):
        generate(model, [[5, 9], [5, 33]], max_new_tokens=4, temperature=1.0)


def test_numbers_in_blocks_are_those_drawn_one_by_one() -> None:
    seeds = (3, 4)
    block = random_numbers([torch.Generator().manual_seed(seed) for seed in seeds], 130)
    alone = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(block, torch.cat([random_numbers(alone, 1) for _ in range(130)]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", ["greedy", "filters", "stops"])
def test_a_gpu_says_what_the_cpu_says(options: str, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where sums in another order change no token of these."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # PyTorch's default for recurrent layers
    on_gpu = LanguageModel(model.config).cuda().eval()
    on_gpu.load_state_dict(model.state_dict())
    check_equal(model, on_gpu, OPTIONS[options])


@pytest.mark.gpu
@needs_gpu
def test_graphs_are_kept_and_read_new_weights(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1").cuda()
    first = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    (kept,) = stepper._idle.waiting(model)
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0).token_ids == first.token_ids
    assert stepper._idle.waiting(model) == [kept]
    with torch.no_grad():
        model.backbone.layers[0].mixer.A_log.add_(1.0)
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    changed = generate(model, PROMPT, max_new_tokens=20, temperature=0)
    assert changed.token_ids != first.token_ids
    assert changed.token_ids == generate(model.cpu(), PROMPT, max_new_tokens=20, temperature=0).token_ids
    model.cuda()
    assert generate(model, PROMPT, max_new_tokens=20, temperature=0).token_ids == changed.token_ids
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
