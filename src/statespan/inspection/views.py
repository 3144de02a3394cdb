"""One layer's view of a text, whatever its mixer is: step sizes, memory, who takes from whom, experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from statespan.inspection.observation import Observation
from statespan.inspection.selection import hidden_attention, memory_lengths, selection_of
from statespan.layers.attention import Attention
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.mixer import Mixer
from statespan.layers.s4 import LTIMixer
from statespan.layers.s6 import S6
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.ops.lti import System

CHANNELS_AT_ONCE = 8  # whose hidden attention matrices are held


@dataclass(frozen=True)
class LayerView:
    """What one layer did with a text of t tokens; a field is None where the layer has no such thing."""

    index: int
    spec: LayerSpec
    dt: Tensor | None = None  # [t c] float64: step size of each channel (Mamba-1) or head (Mamba-2)
    memory: Tensor | None = None  # [c m] float64: tokens until 1/e of a state is left
    # [k t s] float64, who takes from whom. Attention: the weights of each of k heads. State-space layers, k = 1: the
    # mean of |alpha| over some channels, alpha being the matrix that the layer multiplies its input by.
    mixing: Tensor | None = None
    experts: Tensor | None = None  # [t k] int64: the router's choices
    scores: Tensor | None = None  # [t e] float64: the router's scores, after softmax or sigmoid
    note: str = ""  # why there is nothing to see of the mixer


def layer_view(model: LanguageModel, observation: Observation, index: int, num_channels: int = 64) -> LayerView:
    """The view of the layer at `index`, which `observation` has kept.

    Args:
        model: the one observed.
        observation: of `observe`.
        index: of the layer.
        num_channels: how many channels or heads the mean of the hidden attention takes, evenly spaced; at least 1.
    Returns:
        Tensors on the CPU.
    Raises:
        KeyError: `observation` has not kept that layer.

    Example:
        >>> import statespan
        >>> from statespan.inspection import observe
        >>> model = statespan.build("jamba-tiny")
        >>> layer_view(model, observe(model, [5, 6, 7]), 0).mixing.shape
        torch.Size([1, 3, 3])
    """
    spec, mixer = model.config.layers[index], model.layers[index].mixer
    parts = {} if mixer is None else _mixer_view(mixer, observation.mixer_inputs[index], num_channels)
    if index in observation.routers:
        router = observation.routers[index]
        parts |= {"experts": router.chosen.cpu(), "scores": router.scores.cpu().double()}
    return LayerView(index, spec, **parts)


def _mixer_view(mixer: Mixer, hidden: Tensor, num_channels: int) -> dict[str, Any]:
    with torch.inference_mode():
        if isinstance(mixer, Mamba1 | Mamba2 | S6):
            selection = selection_of(mixer, hidden)
            channels = evenly_spaced(selection.num_channels, num_channels)
            mixing = _mean_size(channels, hidden.shape[1], lambda some: hidden_attention(selection, some))
            return {"dt": selection.dt, "memory": memory_lengths(selection), "mixing": mixing}
        if isinstance(mixer, Attention):
            return {"mixing": attention_map(mixer, hidden)}
        if isinstance(mixer, LTIMixer):
            return _lti_view(mixer, hidden.shape[1], num_channels)
    return {"note": "it has neither a step size nor an attention matrix: its state passes gates"}


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, or all, at equal distances from the first on."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _mean_size(channels: list[int], length: int, matrices: Callable[[list[int]], Tensor]) -> Tensor:
    """[1 t s]: the mean of |alpha| over `channels`, a few matrices at a time."""
    total = torch.zeros(1, length, length, dtype=torch.float64)
    for start in range(0, len(channels), CHANNELS_AT_ONCE):
        total += matrices(channels[start : start + CHANNELS_AT_ONCE]).abs().sum(0)
    return total / len(channels)


def attention_map(mixer: Attention, hidden: Tensor) -> Tensor:
    """[h t s] float64: the weights with which each head of an attention layer reads `hidden` [1 t h].

    The layer runs as it is; where it calls PyTorch's attention, that is called once more with the identity for its
    values, which gives the weights themselves.
    """
    with _AttentionWeights() as seen, torch.inference_mode():
        mixer(hidden)
    assert seen.weights is not None  # every attention layer attends
    return seen.weights[0].cpu().double()


class _AttentionWeights(TorchFunctionMode):
    """Catches the weights [b h t s] of the scaled_dot_product_attention that runs inside."""

    weights: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            identity = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
            self.weights = func(query, key, identity.expand(*value.shape[:-1], -1), *args[3:], **kwargs)
        return func(*args, **kwargs)


def _lti_view(mixer: LTIMixer, length: int, num_channels: int) -> dict[str, Any]:
    """A layer whose recurrence does not depend on the text: decay by its eigenvalues, attention from its kernel."""
    system = mixer.system()
    channels = evenly_spaced(mixer.inner_size, num_channels)
    dense = system if isinstance(system, System) else system.dense()
    A = dense.A[channels].cpu()
    sizes = (A if A.dim() == 2 else torch.linalg.eigvals(A)).abs().double()
    kernel = system.kernel(length)[channels].cpu().double().abs().mean(0)
    place = torch.arange(length)
    distance = place.unsqueeze(1) - place
    mixing = torch.where(distance >= 0, kernel[distance.clamp(min=0)], 0.0).unsqueeze(0)
    return {"memory": -1 / sizes.log(), "mixing": mixing}
