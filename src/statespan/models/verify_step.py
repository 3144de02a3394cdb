"""VerifyDecoder: several tokens of each row at once, with the state after each of them kept.

The weights are read once for all tokens; states, keys and values are those that single steps would leave.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from statespan.layers.attention import Attention
from statespan.layers.kv_cache import PagedKVCache
from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.state import ModelState, SSMState, State
from statespan.models.backbone import Block
from statespan.models.decoder import Decoder
from statespan.models.pool_step import MemoryStep, NextSlots
from statespan.ops.decode_step import HeadWeights, Mamba1Weights, Mamba2Weights, prepare_verify


def on_device(device: torch.device) -> bool:
    """Whether there are such steps for models on it."""
    return device.type == "cuda"


class NoVerifyStep(Exception):
    """A layer of the model has no step for several tokens."""


class TokenSlots(NextSlots):
    """Where the next `num_tokens` tokens of each row go; how many tokens the rows have stays as it is."""

    def __init__(self, layer: Attention, cache: PagedKVCache, active: Tensor, num_tokens: int) -> None:
        super().__init__(layer, cache, active)
        self._ahead = torch.arange(num_tokens, dtype=torch.int32, device=active.device)
        self.table, self.seen, self.slot, self.position = (
            tensor.repeat_interleave(num_tokens, dim=0) for tensor in (cache.table, self.seen, self.slot, self.position)
        )

    def step(self) -> None:
        cache, size, active = self._cache, self._cache.page_size, self._active.unsqueeze(1)
        rows, pages = cache.table.shape
        position = (cache.length.unsqueeze(1) + self._ahead) * active  # [b t]
        place = position // size
        # Behind a row's pages there is page 0, which is nobody's.
        page = cache.table.gather(1, place.clamp(max=pages - 1).long()).masked_fill_(place >= pages, 0)
        self.slot.copy_(((page.long() * size + position % size) * active).flatten())
        self.position.copy_(position.flatten())
        self.seen.copy_(((position + 1).clamp_(max=pages * size) * active).flatten())
        self.table.view(rows, -1, pages).copy_(cache.table.unsqueeze(1))
        self._turn()


class VerifyDecoder(Decoder):
    """Feeds `num_tokens` tokens to each row: `decoder(ids [b*t]) -> logits [b*t v]`, as often as wanted.

    Args:
        embedding, blocks, head, head_weights, hidden_dtype, memory, active: as Decoder's; the memory of constant
            states stays as it is, and pages are written behind the rows' length, which stays too.
        num_rows, num_tokens: b and t.
        kept: memory for the constant states after each token, [t b ..] for each layer as [t*b ..].

    Raises:
        NoVerifyStep: a layer has no such step here, or a CUDA graph cannot hold it.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        blocks: Sequence[Block],
        head: Callable[[Tensor], Tensor],
        head_weights: HeadWeights | None,
        num_rows: int,
        num_tokens: int,
        hidden_dtype: torch.dtype,
        memory: ModelState,
        kept: ModelState,
        active: Tensor,
    ) -> None:
        self._num_rows, self._num_tokens = num_rows, num_tokens
        self._kept = iter([layer for layer in kept.layers if isinstance(layer, SSMState)])  # of the layers to come
        rows = num_rows * num_tokens
        super().__init__(embedding, blocks, head, head_weights, rows, hidden_dtype, memory, active)
        if not self.captures:
            raise NoVerifyStep("a CUDA graph cannot hold the steps")

    def filled(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The tokens of the first rows as they are fed, short rows filled up."""
        return [token for row in rows for token in (*row, *[0] * (self._num_tokens - len(row)))]

    def kept_after(self, row: int, count: int) -> int:
        """Which state in `kept` is that of a row after its first `count` tokens."""
        return (count - 1) * self._num_rows + row

    def _add_stack(self, pairs: Sequence[tuple[Block, State | None]]) -> bool:
        return False

    def _new_slots(self, layer: Attention, cache: PagedKVCache, active: Tensor) -> NextSlots:
        return TokenSlots(layer, cache, active, self._num_tokens)

    def _step_in(self, memory: State, layer: Mixer, norm: RMSNorm) -> MemoryStep:
        if isinstance(memory, PagedKVCache) and memory.conv is None:
            return super()._step_in(memory, layer, norm)
        step = self._verify_step(layer, norm)
        if step is None or not isinstance(memory, SSMState):
            raise NoVerifyStep(f"{type(layer).__name__} takes one token at a time here")
        return VerifySSM(step, memory, next(self._kept))

    def _verify_step(self, layer: Mixer, norm: RMSNorm) -> Callable[..., Tensor] | None:
        weights = layer.step_weights(norm)
        if not isinstance(weights, Mamba1Weights | Mamba2Weights):
            return None
        return prepare_verify(weights, self._num_rows, self._num_tokens, self._hidden_dtype, self._dtype)


class VerifySSM:
    """A Mamba mixer, from a state that stays to the states after each token."""

    static = True

    def __init__(self, step: Callable[..., Tensor], before: SSMState, after: SSMState) -> None:
        self._step, self._before, self._after = step, before, after

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._step(hidden, self._before.conv, self._before.ssm, self._after.conv, self._after.ssm)
