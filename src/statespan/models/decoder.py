"""Decoder: one token a row through a model, with everything that stays the same looked up once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statespan.layers.norm import RMSNorm
from statespan.layers.state import ModelState, SSMState, State
from statespan.models.backbone import Block
from statespan.ops.decode_step import FeedForwardWeights, Mamba1Weights, Mamba2Weights, prepare

Step = Callable[[Tensor, State | None], tuple[Tensor, State | None]]


class Decoder:
    """The steps of a generation: `decoder(ids [b], state) -> (logits [b v], state)`, as `model(ids[:, None], state=)`.

    Made by `model.decoder(batch_size)`, for use under torch.inference_mode(). Each half of a block, h + f(norm(h)), is
    one prepared call where `ops.decode_step` has one, and the layers' own forward elsewhere. States go in and come out
    as values. Make a new one when the batch size changes or the weights are moved; not for two threads at once.

    Args:
        embedding, blocks, head: the model's parts; head takes the residual stream [b h] to logits.
        batch_size: b.
        hidden_dtype: of the residual stream.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        blocks: Sequence[Block],
        head: Callable[[Tensor], Tensor],
        batch_size: int,
        hidden_dtype: torch.dtype,
    ) -> None:
        self.batch_size = batch_size
        self._embedding, self._head, self._hidden_dtype = embedding, head, hidden_dtype
        self._steps = [self._block_step(block) for block in blocks]

    def __call__(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Feed one token to each row.

        Args:
            ids: [b] int64, inside the vocabulary.
            state: of this model, b rows; it is not changed.
        Returns:
            The logits of the next token [b v], and the next state.
        """
        hidden = self._embedding(ids).to(self._hidden_dtype)
        states: list[State | None] = []
        for step, before in zip(self._steps, state.layers, strict=True):
            hidden, after = step(hidden, before)
            states.append(after)
        return self._head(hidden), ModelState(tuple(states))

    def _block_step(self, block: Block) -> Step:
        """One block on hidden [b h]."""
        mixer = self._mixer_step(block) if block.mixer is not None else None
        feed_forward = self._feed_forward_step(block) if block.feed_forward is not None else None

        def step(hidden: Tensor, state: State | None) -> tuple[Tensor, State | None]:
            if mixer is not None:
                hidden, state = mixer(hidden, state)
            return (hidden if feed_forward is None else feed_forward(hidden)), state

        return step

    def _mixer_step(self, block: Block) -> Step:
        layer, norm = block.mixer, block.mixer_norm
        assert layer is not None
        weights = layer.step_weights(norm)
        prepared = None if weights is None else self._prepare(weights)
        if prepared is None:
            return _forward_step(layer, norm)

        def step(hidden: Tensor, state: State | None) -> tuple[Tensor, State | None]:
            assert isinstance(state, SSMState)
            hidden, conv, ssm = prepared(hidden, state.conv, state.ssm)
            return hidden, SSMState(conv, ssm)

        return step

    def _feed_forward_step(self, block: Block) -> Callable[[Tensor], Tensor]:
        layer, norm = block.feed_forward, block.feed_forward_norm
        assert layer is not None
        return self._prepare(layer.step_weights(norm)) or (
            lambda hidden: hidden + layer(norm(hidden.unsqueeze(1)))[0].squeeze(1)
        )

    def _prepare(self, weights: Mamba1Weights | Mamba2Weights | FeedForwardWeights) -> Callable[..., Any] | None:
        return prepare(weights, self.batch_size, self._hidden_dtype, self._embedding.weight.dtype)


def _forward_step(layer: torch.nn.Module, norm: RMSNorm) -> Step:
    def step(hidden: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        mixed, state = layer(norm(hidden.unsqueeze(1)), state)
        return hidden + mixed.squeeze(1), state

    return step
