"""Prompts into a state, in chunks; on a GPU by CUDA graphs, which are kept for the next call."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from statespan.layers.state import ModelState
from statespan.models.capture import addresses
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller

KEPT = 2  # prefillers of a model that wait for the next call; each holds its graphs and the state of its rows

_Key = tuple[int, tuple[int, ...]]
_idle: WeakKeyDictionary[LanguageModel, list[tuple[_Key, Prefiller]]] = WeakKeyDictionary()


@torch.inference_mode()
def absorb(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: ModelState, chunk_size: int | None
) -> tuple[Tensor | None, ModelState]:
    """Feed each row its prompt; rows of unequal length are padded on the left, so that all end in the last chunk.

    Returns:
        The logits after the last tokens [b v] float32, or None when all prompts are empty; and the next state.
    """
    length = max(map(len, prompts))
    if length == 0:
        return None, state
    size = min(chunk_size or length, length)
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    place = torch.arange(length)
    real = place >= length - torch.tensor([[len(prompt)] for prompt in prompts])
    chunks = [
        (ids_of_chunk, None if bool(real_in_chunk.all()) else real_in_chunk)
        for ids_of_chunk, real_in_chunk in zip(ids.split(size, 1), real.split(size, 1), strict=True)
    ]
    by_graphs = model.device.type == "cuda" and not torch.is_autocast_enabled("cuda")  # whose casts do not stay
    if by_graphs and Prefiller.serves(len(prompts), size):
        key = len(prompts), addresses(model)
        if (prefiller := _take(model, key)) is not None:
            model.check_state(state, len(prompts))
            prefiller.start(state)
            hidden = [prefiller.feed(*chunk) for chunk in chunks][-1]
            found = model.head(hidden)[:, -1].float(), prefiller.state()
            _give_back(model, key, prefiller)
            return found
    logits = None
    for index, (ids_of_chunk, real_in_chunk) in enumerate(chunks):
        output = model(
            ids_of_chunk.to(model.device),
            attention_mask=None if real_in_chunk is None else real_in_chunk.to(model.device),
            state=state,
            logits_at="last" if index == len(chunks) - 1 else "none",
        )
        assert output.state is not None  # a state went in
        logits, state = output.logits, output.state
    return None if logits is None else logits[:, -1].float(), state


def _take(model: LanguageModel, key: _Key) -> Prefiller | None:
    """A prefiller, until `_give_back`; graphs that an earlier call captured are used again."""
    idle = _idle.setdefault(model, [])
    for place, (its_key, prefiller) in enumerate(idle):
        if its_key == key:
            del idle[place]
            return prefiller
    return model.prefiller(key[0])


def _give_back(model: LanguageModel, key: _Key, prefiller: Prefiller) -> None:
    idle = _idle.setdefault(model, [])
    idle.append((key, prefiller))
    del idle[:-KEPT]
