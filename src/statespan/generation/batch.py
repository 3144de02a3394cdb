"""DecodeBatch: sequences that advance together, one token a row and step, over one explicit model state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.generation.options import GenerationOptions
from statespan.generation.sampling import log_probabilities, sample
from statespan.layers.state import ModelState
from statespan.models.decoder import Decoder
from statespan.models.language_model import LanguageModel, LanguageModelOutput


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own distribution: before penalty, temperature and filters."""

    logprob: float  # of the chosen token
    top: tuple[tuple[int, float], ...] = ()  # (token id, log-probability) of the most likely tokens, best first


@torch.inference_mode()
def absorb(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: ModelState, chunk_size: int | None
) -> tuple[Tensor | None, ModelState]:
    """Feed each row its prompt; rows of unequal length are padded on the left, so that all end in the last chunk.

    Returns:
        The logits after the last tokens [b v] float32, or None when all prompts are empty; and the next state.
    """
    length = max(map(len, prompts))
    if length == 0:
        return None, state
    size = chunk_size or length
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    place = torch.arange(length)
    real = place >= length - torch.tensor([[len(prompt)] for prompt in prompts])
    logits = None
    for start in range(0, length, size):
        chunk = slice(start, start + size)
        output = model(
            ids[:, chunk].to(model.device),
            attention_mask=None if bool(real[:, chunk].all()) else real[:, chunk].to(model.device),
            state=state,
            logits_at="last" if start + size >= length else "none",
        )
        logits, state = output.logits, _state_of(output)
    return None if logits is None else logits[:, -1].float(), state


def _state_of(output: LanguageModelOutput) -> ModelState:
    assert output.state is not None  # a state went in
    return output.state


class DecodeBatch:
    """The rows that are still being generated: their state, their next logits and their random numbers."""

    def __init__(
        self,
        model: LanguageModel,
        logits: Tensor,
        state: ModelState,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        options: GenerationOptions,
    ) -> None:
        """`logits` [b v] and `state` come from `absorb`; `prompts` are the tokens under the repetition penalty."""
        self.model, self.logits, self.state, self.options = model, logits, state, options
        self._ids = torch.empty(0, dtype=torch.int64)
        self._decoder: Decoder | None = None
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._seen: Tensor | None = None
        if options.repetition_penalty != 1:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                seen[torch.tensor(prompt, dtype=torch.int64, device=seen.device)] = True

    @torch.inference_mode()
    def choose(self) -> list[int]:
        """The next token of each row. The state has not absorbed it yet."""
        self._ids = sample(self.logits, self.options, self._generators, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, self._ids.unsqueeze(1), True)
        return self._ids.tolist()

    @torch.inference_mode()
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens just chosen, and of the most likely ones."""
        logprobs = log_probabilities(self.logits)
        chosen: list[float] = logprobs.gather(1, self._ids.unsqueeze(1)).squeeze(1).tolist()
        best = logprobs.topk(min(self.options.num_top, logprobs.shape[1]), dim=1)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [TokenLogprob(c, tuple(zip(*top, strict=True))) for c, top in zip(chosen, tops, strict=True)]

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed the chosen tokens."""
        if self._decoder is None or self._decoder.batch_size != len(self._ids):
            self._decoder = self.model.decoder(len(self._ids))
        logits, self.state = self._decoder(self._ids.to(self.model.device), self.state)
        self.logits = logits.float()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(rows, device=self._ids.device)
        self.state = self.state.select(index)
        self._ids = self._ids[index]
        self._generators = [self._generators[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[index]
