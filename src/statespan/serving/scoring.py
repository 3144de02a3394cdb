"""Log-probabilities of a text that is there already."""

from collections.abc import Sequence

import torch

from statespan.generation.batch import TokenLogprob
from statespan.models.language_model import LanguageModel

CHUNK = 256  # tokens a forward: their logits over the whole vocabulary are held


@torch.inference_mode()
def score(model: LanguageModel, ids: Sequence[int], num_top: int = 0) -> list[TokenLogprob | None]:
    """Of each token given those before it, under the model's own distribution, in nats.

    Args:
        model: in evaluation mode.
        ids: the text, at least one token.
        num_top: how many of the most likely tokens are told at each place.

    Returns:
        One a token; None for the first, which follows nothing.
    """
    tokens = torch.tensor([ids], device=model.device)
    state, scores = model.new_state(1), list[TokenLogprob | None]([None])
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = tokens[:, start : min(start + CHUNK, len(ids) - 1)]
        output = model(chunk, state=state)
        assert output.logits is not None and output.state is not None  # a state went in, no labels
        state, logprobs = output.state, output.logits[0].float().log_softmax(dim=-1)
        following = tokens[0, start + 1 : start + 1 + chunk.shape[1]]
        chosen: list[float] = logprobs.gather(1, following.unsqueeze(1)).squeeze(1).tolist()
        best = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        scores += [TokenLogprob(value, tuple(zip(*top, strict=True))) for value, top in zip(chosen, tops, strict=True)]
    return scores
