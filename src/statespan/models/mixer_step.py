"""How a decoder steps through the half of a block that has a state, and where it keeps that state."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from statespan.layers.attention import Attention
from statespan.layers.kv_cache import KVCache
from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.rotary import rotary_angles
from statespan.layers.state import SSMState, State
from statespan.ops import causal_conv1d_update
from statespan.ops.decode_attention import decode_attention
from statespan.ops.rotary import rotate

GRAIN = 256  # slots of a cache in static memory come in multiples of this
AHEAD = 1024  # slots that it is given for tokens to come, at most


class MixerStep(ABC):
    """Holds the state of one mixer and moves it on by a token a call."""

    static = True  # the state stays where it is in memory, and nothing waits for the device: a CUDA graph may hold it

    @abstractmethod
    def start(self, state: State, room: int) -> bool:
        """Set the state, with room for so many tokens; True where memory moved that a graph may hold."""

    @abstractmethod
    def __call__(self, hidden: Tensor) -> Tensor:
        """The residual stream [b h] after the mixer."""

    @abstractmethod
    def state(self) -> State:
        """The state as a value."""

    def make_room(self) -> bool:
        """Called before each step, also where a graph takes it; True where memory moved."""
        return False


class ValueStep(MixerStep):
    """State in, next state out."""

    static = False

    def __init__(self, step: Callable[[Tensor, Any], tuple[Tensor, Any]]) -> None:
        self._step = step
        self._state: State | None = None

    def start(self, state: State, room: int) -> bool:
        self._state = state
        return False

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden, self._state = self._step(hidden, self._state)
        return hidden

    def state(self) -> State:
        assert self._state is not None  # start comes first
        return self._state


def prepared_step(prepared: Callable[..., Any]) -> ValueStep:
    """Of a call of `ops.decode_step` that gives new states."""

    def step(hidden: Tensor, state: SSMState) -> tuple[Tensor, SSMState]:
        hidden, conv, ssm = prepared(hidden, state.conv, state.ssm)
        return hidden, SSMState(conv, ssm)

    return ValueStep(step)


def layer_step(layer: Mixer, norm: RMSNorm) -> ValueStep:
    """The layer's own forward."""

    def step(hidden: Tensor, state: State) -> tuple[Tensor, State | None]:
        mixed, after = layer(norm(hidden.unsqueeze(1)), state)
        return hidden + mixed.squeeze(1), after

    return ValueStep(step)


def ssm_forward(layer: Mixer, norm: RMSNorm) -> Callable[..., Any]:
    """The own forward of a Mamba layer as a call that gives the residual stream and new states."""

    def step(hidden: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, after = layer(norm(hidden.unsqueeze(1)), SSMState(conv, ssm))
        assert isinstance(after, SSMState)
        return hidden + mixed.squeeze(1), after.conv, after.ssm

    return step


class StaticSSM(MixerStep):
    """A Mamba mixer whose state stays in one place. The step overwrites it, or gives a new one that is copied there."""

    def __init__(self, step: Callable[..., Any], state: SSMState) -> None:
        self._step, self._state = step, state

    def start(self, state: State, room: int) -> bool:
        assert isinstance(state, SSMState)
        self._set(state.conv, state.ssm)
        return False

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden, conv, ssm = self._step(hidden, self._state.conv, self._state.ssm)
        self._set(conv, ssm)
        return hidden

    def _set(self, conv: Tensor, ssm: Tensor) -> None:
        for ours, new in ((self._state.conv, conv), (self._state.ssm, ssm)):
            if ours is not new:
                ours.copy_(new)

    def state(self) -> State:
        return self._state.clone()


class StaticAttention(MixerStep):
    """Attention over a buffer of fixed size, of which so many slots are in use as a number on the device says."""

    def __init__(self, layer: Attention, norm: RMSNorm, empty: KVCache) -> None:
        self._layer, self._norm = layer, norm
        self._cache = empty  # `length` is that of the start
        self._tokens = 0  # since then
        self._slot = torch.zeros(1, dtype=torch.int64, device=empty.key.device)  # of the next token
        self._length = torch.zeros(1, dtype=torch.int32, device=empty.key.device)  # slots in use with it

    def start(self, state: State, room: int) -> bool:
        assert isinstance(state, KVCache)
        used, wanted = slice(0, state.length), state.length + min(room, AHEAD)
        moved = wanted > self._cache.key.shape[1]
        if moved:
            self._cache = _adopted(state, wanted) or _with_capacity(self._cache, -(-wanted // GRAIN) * GRAIN)
        ours = self._cache
        for buffer, source in ((ours.key, state.key), (ours.value, state.value), (ours.position, state.position)):
            if buffer is not source:
                buffer[:, used].copy_(source[:, used])
        ours.position[:, state.length :].fill_(-1)
        ours.next_position.copy_(state.next_position)
        if ours.conv is not None and state.conv is not None:
            ours.conv.copy_(state.conv)
        self._slot.fill_(state.length)
        self._length.fill_(state.length + 1)
        self._cache = replace(ours, length=state.length, dropped=state.dropped, dense=state.dense)
        self._tokens = 0
        return moved

    def make_room(self) -> bool:
        full = self._cache.length + self._tokens >= self._cache.key.shape[1]
        moved = full and self.start(self._value(), AHEAD)
        self._tokens += 1
        return moved

    def state(self) -> State:
        return self._value().clone()

    def _value(self) -> KVCache:
        """The slots in use; appending to it copies it first."""
        cache, length = self._cache, self._cache.length + self._tokens
        key, value, position = (x[:, :length] for x in (cache.key, cache.value, cache.position))
        return KVCache(key, value, position, cache.next_position, cache.conv, length, cache.dropped, cache.dense)

    def __call__(self, hidden: Tensor) -> Tensor:
        layer, cache = self._layer, self._cache
        qkv = layer.qkv_proj(layer.placed(self._norm(hidden), cache.next_position))
        if cache.conv is not None:
            qkv = convolved(layer, qkv, cache.conv)
        heads = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
        query, key, value = qkv.view(len(qkv), 1, -1, layer.head_dim).split(heads, dim=2)
        if layer.config.rope_theta is not None:
            cos, sin = rotary_angles(cache.next_position.unsqueeze(1), layer.config, layer.head_dim)
            query = rotate(query, cos, sin, interleaved=layer.config.rotary_interleaved)
            key = rotate(key, cos, sin, interleaved=layer.config.rotary_interleaved)
        for buffer, new in ((cache.key, key), (cache.value, value), (cache.position, cache.next_position.unsqueeze(1))):
            buffer.index_copy_(1, self._slot, new.to(buffer.dtype))
        mixed = decode_attention(
            query.squeeze(1),
            cache.key,
            cache.value,
            cache.position,
            length=self._length,
            next_position=cache.next_position,
            sliding_window=layer.config.sliding_window,
        )
        for count in (cache.next_position, self._slot, self._length):
            count.add_(1)
        return hidden + layer.out_proj(mixed.flatten(1))


def convolved(layer: Attention, qkv: Tensor, window: Tensor) -> Tensor:
    """q, k and v [b c] after the layer's conv, whose window is overwritten."""
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    qkv, after = causal_conv1d_update(window, qkv.to(window.dtype), weight, bias, activation=None)
    window.copy_(after)
    return qkv


def _adopted(state: KVCache, capacity: int) -> KVCache | None:
    """The state's own buffers, for writing behind what it knows; None where they are too small, or somebody has.

    Keys and values are the most of a Transformer's memory: a copy would hold them twice.
    """
    if state.key.shape[1] < capacity or state.fill.count != state.length:
        return None
    state.fill.count = state.key.shape[1]  # who appends to the state copies it first
    for buffer in (state.key, state.value):
        buffer[:, state.length :].zero_()  # as in fresh ones
    conv = None if state.conv is None else state.conv.clone()
    return replace(state, next_position=state.next_position.clone(), conv=conv)


def _with_capacity(cache: KVCache, capacity: int) -> KVCache:
    """Fresh buffers; zeros, since what the mask hides is multiplied by zero."""
    key, value, position = (
        x.new_zeros(x.shape[0], capacity, *x.shape[2:]) for x in (cache.key, cache.value, cache.position)
    )
    return replace(cache, key=key, value=value, position=position)
