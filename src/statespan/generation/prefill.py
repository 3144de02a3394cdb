"""Prompts into a state, in chunks; on a GPU by CUDA graphs, which are kept for the next call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from statespan.generation.idle import Idle, has_graphs
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller

KEPT = 2  # prefillers of a model that wait for the next call; each holds its graphs and the state of its rows

_idle: Idle[Prefiller | None] = Idle(KEPT)


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
    by_graphs = has_graphs(model) and not torch.is_autocast_enabled("cuda")  # whose casts do not stay
    if by_graphs and Prefiller.serves(len(prompts), size):
        prefiller = _idle.take(model, len(prompts), lambda: model.prefiller(len(prompts)))
        if prefiller is not None:
            model.check_state(state, len(prompts))
            prefiller.start(state)
            hidden = [prefiller.feed(*chunk) for chunk in chunks][-1]
            found = model.head(hidden)[:, -1].float(), prefiller.state()
            _idle.give_back(model, prefiller)
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
