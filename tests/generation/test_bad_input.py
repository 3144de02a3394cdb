"""Every mistake that a caller can make is one line that names it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from statespan.errors import UserError
from statespan.generation import generate, generate_stream
from statespan.models.language_model import LanguageModel


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1, 2], {"max_token": 3}, r"in generate.* 'max_token'; did you mean 'max_new_tokens'\?"),
        ([1, 2], {"temprature": 3}, "did you mean 'temperature'"),
        ([1, 2], {"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ([1, 2], {"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1"),
        ([1, 2], {"logprobs": -1}, "logprobs must be at least 0"),
        ([1, 2], {"top_p": 2}, "top_p must be"),
        ([1, 2], {"temperature": "hot"}, "generate.temperature: expected a number"),
        ([1, 2], {"stop_token_ids": 5}, "generate.stop_token_ids: expected a list"),
        ([1, 2], {"stop": "x"}, "stop strings need a tokenizer"),
        ("text", {}, "the model has no tokenizer"),
        ([], {}, "prompt 0 is empty and the model has no BOS token"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 61], {}, "token id 61 of prompt 0 is out of range; the vocabulary is 0 to 60"),
        ([[1], [-1]], {}, "token id -1 of prompt 1"),
        ([1.5, 2.0], {}, "prompt 0 is neither text nor a list of integers"),
        (torch.tensor([1.5]), {}, "prompt 0 is neither text nor a list of integers"),
        ([[1], 2], {}, "prompt 1 is neither text nor a list of integers"),
        ([1, [2]], {}, "prompt 0 is neither text nor a list of integers"),
        (np.array([[1, 2]]), {}, "prompt 0 is neither text nor a list of integers"),
        (5, {}, "a prompt is text or a list of token ids, .*; got one int"),
        (None, {}, "got one NoneType"),
        (torch.tensor(5), {}, "got one Tensor"),
        (np.array(5), {}, "got one ndarray"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), {}, "prompt 0 is neither"),
        (
            torch.tensor([[1, 2]]),
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask is \[1, 3\] and the ids \[1, 2\]",
        ),
        ([[1, 2]], {"attention_mask": torch.ones(1, 2)}, "attention_mask goes with a"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.zeros(1, 2)}, "prompt 0 is empty"),
    ],
)
def test_bad_arguments(
    tiny: Callable[[str], LanguageModel], prompt: Any, options: dict[str, Any], message: str
) -> None:
    model = tiny("mamba1")
    for call in (generate, generate_stream):  # the stream raises when it is made, not at its first token
        with pytest.raises(UserError, match=message) as caught:
            call(model, prompt, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("iterate", [iter, lambda ids: (i for i in ids), lambda ids: map(int, ids)])
def test_an_iterator_is_refused(tiny: Callable[[str], LanguageModel], iterate: Callable[[list[int]], Any]) -> None:
    """It would be read twice: for what it is, and for its tokens."""
    with pytest.raises(UserError, match=r"a prompt is text or a list of token ids, .*; got one (list_iter|gener|map)"):
        generate(tiny("mamba1"), iterate([1, 2]), max_new_tokens=1)


@pytest.mark.parametrize("prompt", [(1, 2), range(1, 3), np.array([1, 2]), [np.int64(1), 2], bytes([1, 2])])
def test_ids_of_any_kind_of_sequence(tiny: Callable[[str], LanguageModel], prompt: Any) -> None:
    model = tiny("mamba1")
    found = generate(model, prompt, max_new_tokens=3, temperature=0)
    assert found.token_ids == generate(model, [1, 2], max_new_tokens=3, temperature=0).token_ids


def test_an_empty_stop_string(scripted: Any) -> None:
    with pytest.raises(UserError, match="a stop string is empty"):
        generate_stream(scripted({}), "a", stop=["x", ""])


def test_logits_that_are_nan_name_prompt_and_token(tiny: Callable[[str], LanguageModel]) -> None:
    model = tiny("mamba1")
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(UserError, match=r"prompt 1, new token 0: the largest logit is nan; .*check the checkpoint"):
        generate(model, [[1, 2], [3, 7]])


def test_nan_after_a_row_has_left_names_the_right_prompt(scripted: Any) -> None:
    class Broken(scripted):
        def __call__(self, ids: torch.Tensor, **arguments: Any) -> Any:
            output = super().__call__(ids, **arguments)
            output.logits[output.state.layers[0].hidden[:, 1] > 3] = math.nan
            return output

    with pytest.raises(UserError, match="prompt 1, new token 3"):
        generate(Broken({"a": b"x", "b": b"longer"}), ["a", "b"], temperature=0)
