"""What one layer does with each token, at the cost of one forward pass: for a server's token view."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from statespan.generation.streaming import Decodes, TextDecoder
from statespan.inspection.observation import check_layers, log_probabilities, observe
from statespan.inspection.selection import selection_of
from statespan.layers.mamba1 import Mamba1
from statespan.layers.mamba2 import Mamba2
from statespan.layers.s6 import S6
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class TokenView:
    """One entry a token of the text."""

    dt: tuple[float, ...] | None  # mean step size over the layer's channels; None: the layer has none
    experts: tuple[tuple[int, ...], ...] | None  # the router's choices; None: the layer has no experts
    logprobs: tuple[float | None, ...]  # log p of the token after those before it, in nats; None for the first


def token_view(model: LanguageModel, ids: Sequence[int] | Tensor, layer: int) -> TokenView:
    """Step size, experts and log-probability of each token of one text, as the layer at `layer` sees them.

    Args:
        model: of any family.
        ids: [t], token ids in [0, vocab_size), at least one.
        layer: from 0 on.
    Returns:
        Plain numbers, an entry a token.
    Raises:
        UserError: no token, or an id or layer that the model does not have.

    Example:
        >>> import statespan
        >>> view = token_view(statespan.build("jamba-tiny"), [5, 6, 7], layer=0)
        >>> len(view.dt), view.logprobs[0]
        (3, None)
    """
    check_layers(model, [layer])
    observation = observe(model, ids, layers=[layer])
    mixer, dt, experts = model.layers[layer].mixer, None, None
    if isinstance(mixer, Mamba1 | Mamba2 | S6):
        dt = tuple(selection_of(mixer, observation.mixer_inputs[layer]).dt.mean(1).tolist())
    if layer in observation.routers:
        experts = tuple(tuple(choices) for choices in observation.routers[layer].chosen.tolist())
    logprobs = log_probabilities(model, observation).tolist()
    return TokenView(dt, experts, tuple(value if math.isfinite(value) else None for value in logprobs))


def token_texts(tokenizer: Decodes, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: "" until a character is complete. Joined they are the whole text."""
    decoder = TextDecoder(tokenizer)
    texts = [decoder.push(token_id) for token_id in ids]
    texts[-1] += decoder.flush()
    return texts
