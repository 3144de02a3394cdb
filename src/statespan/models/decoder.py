"""Decoder: one token a row through a model, with everything that stays the same looked up once."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from statespan.layers.attention import Attention
from statespan.layers.kv_cache import KVCache, PagedKVCache
from statespan.layers.linear import projection_of
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mixer import Mixer
from statespan.layers.mlp import MLP
from statespan.layers.moe import MoE
from statespan.layers.norm import RMSNorm
from statespan.layers.state import ModelState, SSMState, State
from statespan.models.backbone import Block
from statespan.models.capture import capturing
from statespan.models.mixer_step import (
    MixerStep,
    StaticAttention,
    StaticSSM,
    layer_step,
    prepared_step,
    ssm_forward,
)
from statespan.models.pool_step import Held, MemoryStep, NextSlots, PagedAttention
from statespan.ops.decode_step import (
    FeedForwardWeights,
    HeadWeights,
    Mamba1Weights,
    Mamba2Weights,
    prepare,
    prepare_stack,
)
from statespan.ops.decode_step.tokens import embedder
from statespan.ops.dispatch import resolve

Step = Callable[[Tensor], Tensor]
Weights = Mamba1Weights | Mamba2Weights | FeedForwardWeights | HeadWeights


class Decoder:
    """The steps of a generation: `start(state)`, then `decoder(ids [b]) -> logits [b v]` as often as wanted.

    Made by `model.decoder(batch_size)`, for use under torch.inference_mode(). Each half of a block, h + f(norm(h)), is
    one prepared call where `ops.decode_step` has one, and the layers' own forward elsewhere. On a GPU the state lives
    in memory of the decoder, so that the steps can be a CUDA graph: see `captured`. Make a new decoder when the
    batch size changes or the weights are moved; not for two threads at once.

    Args:
        embedding, blocks, head: the model's parts; head takes the residual stream [b h] to logits.
        head_weights: what a prepared step of the head reads; None: it has none.
        batch_size: b.
        hidden_dtype: of the residual stream.
        memory: states of all layers that the steps go on from and overwrite, in place of `start` and `state`: the
            first rows of a serving.StatePool.
        active: [b] int32, with `memory`: 0 for a row that only fills up the batch.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        blocks: Sequence[Block],
        head: Callable[[Tensor], Tensor],
        head_weights: HeadWeights | None,
        batch_size: int,
        hidden_dtype: torch.dtype,
        memory: ModelState | None = None,
        active: Tensor | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._hidden_dtype = hidden_dtype
        self._device, self._dtype = embedding.weight.device, embedding.weight.dtype
        prepared = embedder(embedding.weight, batch_size, hidden_dtype)
        self._embed = prepared or (lambda ids: embedding(ids).to(hidden_dtype))
        self._head = (None if head_weights is None else self._prepare(head_weights)) or head
        self._mixers: list[MixerStep | None] = []  # one a block; None too where memory was given
        self._halves: list[Step] = []  # in the order in which they run
        self.captures = self._device.type == "cuda"  # whether a CUDA graph can hold the steps
        self._slots: NextSlots | None = None  # of paged memory
        states = [None] * len(blocks) if memory is None else memory.layers
        for block, state in zip(blocks, states, strict=True):
            if isinstance(block.mixer, Attention) and isinstance(state, PagedKVCache) and active is not None:
                self._slots = self._slots or self._new_slots(block.mixer, state, active)
        for alike, group in groupby(zip(blocks, states, strict=True), key=lambda pair: _is_mamba1(pair[0])):
            pairs = list(group)
            if not (alike and self._add_stack(pairs)):
                for block, state in pairs:
                    self._add(block, state)
        self.capturing = False  # a graph: nothing runs now, and each replay makes room for its token itself
        self.moves = 0  # how often memory moved that a graph may hold

    def start(self, state: ModelState, room: int = 1) -> None:
        """Go on from `state`, of this model with b rows; it is not changed. `room`: how many tokens will come."""
        for mixer, layer in zip(self._mixers, state.layers, strict=True):
            if mixer is not None and layer is not None:
                self.moves += mixer.start(layer, room)

    def state(self) -> ModelState:
        """The state as a value."""
        return ModelState(tuple(None if mixer is None else mixer.state() for mixer in self._mixers))

    def __call__(self, ids: Tensor) -> Tensor:
        """Feed one token to each row, ids [b] int64 inside the vocabulary; gives the logits of the next token [b v]."""
        if not self.capturing:
            self.expect_token()
        if self._slots is not None:
            self._slots.step()
        hidden = self._embed(ids)
        for half in self._halves:
            hidden = half(hidden)
        return self._head(hidden)

    def expect_token(self) -> None:
        """Make room for one more token."""
        for mixer in self._mixers:
            if mixer is not None:
                self.moves += mixer.make_room()

    def captured(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`run`, which feeds this decoder one token a row, as one CUDA graph where that can be.

        Apart from this it works on tensors that stay where they are, and waits for nothing. What it returns is
        overwritten by the next call. The first call runs as it is, for what is compiled or looked up then.
        """
        return _Captured(self, run) if self.captures else run

    def _add(self, block: Block, memory: State | None) -> None:
        """The steps of one block."""
        mixer = None
        if block.mixer is not None and memory is not None:
            step = self._step_in(memory, block.mixer, block.mixer_norm)
            self._halves.append(step)
            self.captures = self.captures and step.static
        elif block.mixer is not None:
            mixer = self._mixer_step(block.mixer, block.mixer_norm)
            self._halves.append(mixer)
            self.captures = self.captures and mixer.static
        self._mixers.append(mixer)
        if block.feed_forward is not None:
            self._halves.append(self._feed_forward_step(block.feed_forward, block.feed_forward_norm))

    def _add_stack(self, pairs: Sequence[tuple[Block, State | None]]) -> bool:
        """One step for blocks of Mamba-1 alone; False where each needs its own."""
        if len(pairs) < 2 or self._device.type != "cuda":
            return False
        weights, states, mixers = list[Mamba1Weights](), list[SSMState](), list[MixerStep | None]()
        for block, memory in pairs:
            layer, norm = block.mixer, block.mixer_norm
            assert isinstance(layer, Mamba1)
            state = layer.new_state(self.batch_size, self._device, self._dtype) if memory is None else memory
            assert isinstance(state, SSMState)
            weights.append(layer.step_weights(norm))
            states.append(state)
            mixers.append(StaticSSM(ssm_forward(layer, norm), state) if memory is None else None)
        step = prepare_stack(weights, [(state.conv, state.ssm) for state in states], self._hidden_dtype)
        if step is None:
            return False
        self._halves.append(step)
        self._mixers += mixers
        return True

    def _mixer_step(self, layer: Mixer, norm: RMSNorm) -> MixerStep:
        weights = layer.step_weights(norm)
        prepared = None if weights is None else self._prepare(weights)
        if self._device.type != "cuda":
            return layer_step(layer, norm) if prepared is None else prepared_step(prepared)
        state = layer.new_state(self.batch_size, self._device, self._dtype)
        if isinstance(state, SSMState):
            return StaticSSM(prepared or ssm_forward(layer, norm), state)
        if isinstance(layer, Attention) and isinstance(state, KVCache):
            return StaticAttention(layer, norm, state)
        return layer_step(layer, norm)

    def _new_slots(self, layer: Attention, cache: PagedKVCache, active: Tensor) -> NextSlots:
        return NextSlots(layer, cache, active)

    def _step_in(self, memory: State, layer: Mixer, norm: RMSNorm) -> MemoryStep:
        """The step of a mixer that overwrites this state."""
        if isinstance(memory, SSMState):
            weights = layer.step_weights(norm)
            prepared = None if weights is None else self._prepare(weights)
            return StaticSSM(prepared or ssm_forward(layer, norm), memory)
        if isinstance(layer, Attention) and isinstance(memory, PagedKVCache):
            assert self._slots is not None  # memory comes with `active`
            slots, qkv, project = self._slots, projection_of(layer.qkv_proj), None
            if layer.config.learned_positions is None:
                project = self._prepare(HeadWeights(norm.weight, norm.epsilon, qkv, qkv.weight.shape[0]))
            placed = project or (lambda x: layer.qkv_proj(layer.placed(norm(x), slots.position)))
            return PagedAttention(layer, placed, memory, slots)
        return Held(layer, norm, memory)

    def _feed_forward_step(self, layer: MLP | MoE, norm: RMSNorm) -> Step:
        prepared = self._prepare(layer.step_weights(norm))
        if prepared is not None:
            return prepared
        if isinstance(layer, MoE) and resolve("grouped_mlp", "auto", self._device, self._dtype) != "triton":
            self.captures = False  # the others wait for the device
        return lambda hidden: hidden + layer(norm(hidden.unsqueeze(1)))[0].squeeze(1)

    def _prepare(self, weights: Weights) -> Callable[..., Any] | None:
        return prepare(weights, self.batch_size, self._hidden_dtype, self._dtype)


def _is_mamba1(block: Block) -> bool:
    """Whether the block is a Mamba-1 mixer alone."""
    return isinstance(block.mixer, Mamba1) and block.feed_forward is None


class _Captured:
    """A graph that is captured at the second call, and again where memory moved."""

    def __init__(self, decoder: Decoder, run: Callable[[], Tensor]) -> None:
        self._decoder, self._run = decoder, run
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        self._moves = -1  # of the decoder, that the graph knows of

    def __call__(self) -> Tensor:
        decoder = self._decoder
        if self._output is None:
            self._output = self._run()
            return self._output
        decoder.expect_token()
        if self._graph is None or self._moves != decoder.moves:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._output

    def _capture(self) -> None:
        decoder, graph = self._decoder, torch.cuda.CUDAGraph()
        self._graph = None  # also where this fails, for lack of memory: then the next call tries again
        decoder.capturing = True
        try:
            with capturing(graph):
                self._output = self._run()
        finally:
            decoder.capturing = False
        self._graph, self._moves = graph, decoder.moves
