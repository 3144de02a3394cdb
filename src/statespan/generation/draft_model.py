"""DraftModel: drafts of a smaller model of the same vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.drafters import Draft
from statespan.generation.sampling import Sampling, choose, random_numbers, weights
from statespan.generation.steps import Steps, feed, reclaim
from statespan.models.language_model import LanguageModel

FEW = 4  # tokens that are fed one by one in less time than at once
DRAFT_SEED = 0x5EED  # keeps what a drafter draws apart from the numbers that judge it


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary (arXiv 2211.17192). It chooses its tokens as the large one does."""

    model: LanguageModel

    def begin(self, target: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> "ModelDrafting":
        theirs, ours = self.model.config.vocab_size, target.config.vocab_size
        if theirs != ours:
            raise UserError(f"the draft model has {theirs} tokens and the model {ours}; they must share a vocabulary")
        return ModelDrafting(self.model, sampling, seeds)


class ModelDrafting:
    """Drafting by a model. Its state has absorbed the beginnings of the texts; what it only drafted it forgets."""

    def __init__(self, model: LanguageModel, sampling: Sampling, seeds: Sequence[int]) -> None:
        # The penalty depends on the drafts themselves; the verifier counts it in.
        self._model, self._sampling = model, sampling
        self._generators = [torch.Generator().manual_seed((seed ^ DRAFT_SEED) % 2**63) for seed in seeds]
        self._state = model.new_state(len(seeds))
        self._absorbed = [0] * len(seeds)
        self._step = Steps(model, len(seeds))

    def keep(self, rows: Sequence[int]) -> None:
        self._generators = [self._generators[row] for row in rows]
        self._absorbed = [self._absorbed[row] for row in rows]
        self._state = self._state.select(torch.tensor(rows))
        self._step = Steps(self._model, len(rows))

    @torch.inference_mode()
    def propose(self, texts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[Draft]:
        logits = self._catch_up(texts)
        self._step.start(self._state, max(counts))
        ids: list[list[int]] = []
        probabilities: list[Tensor] = []
        for step in range(max(counts)):
            if step:
                logits = self._step(ids[-1])
            ids.append(self._choose(logits.float(), probabilities))
        drafts: list[Draft] = []
        for row, count in enumerate(counts):
            drawn = (
                None if self._sampling.greedy else torch.stack([q[row] for q in probabilities[:count]] or [logits[0]])
            )
            drafts.append(Draft(tuple(step[row] for step in ids[:count]), drawn))
        return drafts

    def _choose(self, logits: Tensor, probabilities: list[Tensor]) -> list[int]:
        if self._sampling.greedy:
            return logits.argmax(-1).tolist()
        likely = weights(logits, self._sampling)
        probabilities.append(likely / likely.sum(-1, keepdim=True))
        numbers = random_numbers(self._generators, 1)[0].to(logits.device)
        return choose(logits, self._sampling, numbers)[0].tolist()

    def _catch_up(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Absorb what is new in the texts, one token at least: the logits after them [b v]."""
        new = [text[done:] for text, done in zip(texts, self._absorbed, strict=True)]
        self._absorbed = [len(text) for text in texts]
        reclaim(self._state)
        length = len(new[0])
        if length > FEW or any(len(tokens) != length for tokens in new):
            logits, self._state = feed(self._model, new, self._state)
            return logits[:, -1]
        self._step.start(self._state, length)
        for column in range(length - 1):
            self._step([tokens[column] for tokens in new])
        logits = self._step([tokens[-1] for tokens in new])
        self._state = self._step.state()
        return logits
