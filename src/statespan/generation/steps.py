"""How a batch of a few tokens a row is fed: step by step, or at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from statespan.layers.kv_cache import KVCache
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel


class Steps:
    """Single steps of a batch: a decoder fed from the host; on a GPU a CUDA graph."""

    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        decoder, ids = model.decoder(batch_size), torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._decoder, self._ids, self.captures = decoder, ids, decoder.captures
        self._run = decoder.captured(lambda: decoder(ids))

    def start(self, state: ModelState, room: int) -> None:
        """Go on from `state`, which is not changed, with room for so many tokens."""
        self._decoder.start(state, room)

    def state(self) -> ModelState:
        """The state as a value."""
        return self._decoder.state()

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Feed each row its token: logits [b v], overwritten by the next step."""
        self._ids.copy_(torch.tensor(token_ids))
        return self._run()


def reclaim(state: ModelState) -> None:
    """Let caches grow in place again: what was appended behind `state` is given up, and nobody holds it."""
    for layer in state.layers:
        if isinstance(layer, KVCache):
            layer.fill.count = layer.length


def feed(
    model: LanguageModel, rows: Sequence[Sequence[int]], state: ModelState, length: int = 0
) -> tuple[Tensor, ModelState]:
    """Feed rows of unequal length, padded on the left, to `length` at least: logits [b t v] and the next state."""
    length = max(length, *map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=model.device)
    mask: Tensor | None = None
    if any(len(row) < length for row in rows):
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model(ids, attention_mask=mask, state=state)
    assert output.logits is not None and output.state is not None  # a state went in, and logits were asked for
    return output.logits, output.state
