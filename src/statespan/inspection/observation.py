"""One forward pass over a text that keeps what each layer reads and decides: the ground of every view."""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.routing import RouterMetrics
from statespan.models.language_model import LanguageModel

HEAD_TOKENS = 256  # whose logits are held at a time


@dataclass(frozen=True)
class Observation:
    """What went through a model when it read one text of t tokens."""

    ids: Tensor  # [t] int64, on the model's device
    mixer_inputs: dict[int, Tensor]  # by layer: [1 t h], the norm's output that its mixer reads
    routers: dict[int, RouterMetrics]  # by layer, those with experts
    hidden: Tensor  # [1 t h], the residual stream after the last layer

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return len(self.ids)


def observe(model: LanguageModel, ids: Sequence[int] | Tensor, layers: Collection[int] | None = None) -> Observation:
    """Run the model over one text from its start, in evaluation mode, and keep what its layers read.

    The blocks are called one by one with values, so that nothing is hooked into a model that others may be running.

    Args:
        model: of any family.
        ids: [t], token ids in [0, vocab_size), at least one.
        layers: whose mixers' inputs are kept; None: of all.
    Returns:
        The tensors that were read, on the model's device.
    Raises:
        UserError: no token, or an id or layer that the model does not have.

    Example:
        >>> import statespan
        >>> observe(statespan.build("jamba-tiny"), [1, 2, 3], layers=[0]).mixer_inputs[0].shape[1]
        3
    """
    ids = _checked_ids(model, ids)
    check_layers(model, layers or ())
    with _evaluating(model), torch.inference_mode():
        hidden, update = model.embedding(ids.unsqueeze(0)).to(model.stream_dtype), None
        inputs: dict[int, Tensor] = {}
        routers: dict[int, RouterMetrics] = {}
        for index, block in enumerate(model.layers):
            if block.mixer is not None and (layers is None or index in layers):
                inputs[index] = block.mixer_norm.add(hidden, update)[0]
            hidden, update, _, router = block(hidden, update)
            if router is not None:
                routers[index] = router
        return Observation(ids, inputs, routers, hidden if update is None else hidden + update)


@contextmanager
def _evaluating(model: LanguageModel) -> Generator[None]:
    """Experts without capacity or balancing while the block runs; a model that does not train is left alone."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def log_probabilities(model: LanguageModel, observation: Observation) -> Tensor:
    """[t] float64 on the CPU: log p of each token after those before it, in nats; NaN for the first.

    Logits are held for a few tokens at a time.
    """
    ids, pieces = observation.ids, [torch.full((1,), torch.nan, dtype=torch.float64)]
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, HEAD_TOKENS):
            stop = min(start + HEAD_TOKENS, len(ids) - 1)
            logits = model.head(observation.hidden[0, start:stop])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.log_softmax(-1).gather(1, ids[start + 1 : stop + 1].unsqueeze(1))
            pieces.append(chosen.squeeze(1).cpu().double())
    return torch.cat(pieces)


def check_layers(model: LanguageModel, layers: Collection[int]) -> None:
    """UserError for a layer that the model does not have."""
    last = len(model.layers) - 1
    for layer in layers:
        if not 0 <= layer <= last:
            raise UserError(f"the model has no layer {layer}; its layers are 0 to {last}")


def _checked_ids(model: LanguageModel, ids: Sequence[int] | Tensor) -> Tensor:
    ids = torch.as_tensor(ids, dtype=torch.int64)
    if ids.dim() != 1 or len(ids) == 0:
        raise UserError(f"ids must be one text of at least one token, got the shape {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.config.vocab_size:
        bad = low if low < 0 else high
        raise UserError(f"token id {bad} is out of range; the vocabulary is 0 to {model.config.vocab_size - 1}")
    return ids.to(model.device)
