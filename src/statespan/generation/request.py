"""Request: one call of generate, its prompts checked, and the events they give."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from statespan.errors import UserError
from statespan.generation.batch import DecodeBatch
from statespan.generation.options import GenerationOptions
from statespan.generation.prefill import absorb
from statespan.generation.prompts import Prompt, Prompts, read_prompts
from statespan.generation.sampling import NonFiniteLogits
from statespan.generation.state import GenerationState
from statespan.generation.stopping import StopStrings
from statespan.generation.streaming import FinishReason, StreamEvent, TextDecoder
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel, Tokenizer

if TYPE_CHECKING:
    from statespan.generation.speculative import Speculation, SpeculationReport, SpeculativeBatch


@dataclass
class _Row:
    """A prompt that is being continued."""

    index: int  # of the prompt
    decoder: TextDecoder | None  # None without a tokenizer
    stops: StopStrings
    count: int = 0  # new tokens
    finish_reason: FinishReason | None = None


class Request:
    """Everything that can be wrong with the arguments of `generate` is found when this is made."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt | Prompts,
        state: GenerationState | ModelState | None,
        tokenizer: Tokenizer | None,
        attention_mask: Tensor | None,
        options: GenerationOptions,
        speculation: "Speculation | None" = None,
    ) -> None:
        self.model, self.options, self.speculation = model, options, speculation
        self.report: SpeculationReport | None = None  # of the speculation, while and after it runs
        self.tokenizer = tokenizer = tokenizer or _tokenizer_of(model)
        if options.stop_strings and tokenizer is None:
            raise UserError("stop strings need a tokenizer, and the model has none; pass tokenizer= or stop_token_ids=")
        self.prompts = read_prompts(
            model, prompt, tokenizer=tokenizer, attention_mask=attention_mask, continues=state is not None
        )
        self._start_from(state)
        self._was_training: list[nn.Module] = []
        first = int(torch.randint(2**62, ())) if options.seed is None else options.seed
        self.seeds = [(first + index) % 2**63 for index in range(len(self.prompts))]
        eos = (*model.config.eos_token_ids, *(tokenizer.eos_ids if tokenizer is not None else ()))
        self._stop_ids = frozenset(options.stop_token_ids)
        self._eos_ids = frozenset[int]() if options.ignore_eos else frozenset(eos)
        self.start_s = self.first_token_s = 0.0  # of time.perf_counter

    def _start_from(self, state: GenerationState | ModelState | None) -> None:
        """Set the state, and for each prompt the state's row and the tokens that it is fed."""
        pending: tuple[int, ...] = ()
        if isinstance(state, GenerationState):
            pending, state = (state.pending,), state.model_state
        self._state = self.model.new_state(1) if state is None else state
        rows = self._state.batch_size
        if rows not in (1, len(self.prompts)):
            raise UserError(
                f"the state has {rows} rows and there are {len(self.prompts)} prompts; it needs one, or one a prompt"
            )
        self._feeds = [(index % rows, (*pending, *ids)) for index, ids in enumerate(self.prompts)]
        for index, (_, ids) in enumerate(self._feeds):
            if not ids:
                raise UserError(f"prompt {index} is empty; the state of a forward needs a token to go on with")

    def events(self) -> Iterator[StreamEvent]:
        """The new tokens of all prompts, step by step. Until the last one the model is in evaluation mode."""
        try:
            yield from self._events()
        finally:
            for module in self._was_training:
                # Not nn.Module's own way, which fails where a forgotten stream ends with the interpreter.
                object.__setattr__(module, "training", True)

    def _events(self) -> Iterator[StreamEvent]:
        self.start_s = self.first_token_s = time.perf_counter()
        if not self.prompts:
            return
        logits, state = self._prefill()
        if logits is None or self.options.max_new_tokens == 0:
            yield from self._without_tokens(state)
            return
        batch = self._batch(logits, state)
        rows = [self._row(index) for index in range(len(self.prompts))]
        while rows:
            new = self._choose(batch, rows)
            logprobs = None if self.options.logprobs is False else batch.logprobs()
            for place, row in enumerate(rows):
                for count, token in enumerate(new[place]):
                    text = self._extend(row, token)
                    ends = row.finish_reason is not None and self.options.return_state
                    end = self._end_state(*batch.state_of(place, count + 1), token) if ends else None
                    logprob = None if logprobs is None else logprobs[place][count]
                    yield StreamEvent(row.index, text, token, logprob, row.finish_reason, end)
                    if row.finish_reason is not None:
                        break
            going = [place for place, row in enumerate(rows) if row.finish_reason is None]
            if going and len(going) < len(rows):
                batch.keep(going)
            rows = [rows[place] for place in going]
            if rows:
                self._evaluate()
                batch.advance()

    def _batch(self, logits: Tensor, state: ModelState) -> "DecodeBatch | SpeculativeBatch":
        arguments = (self.model, logits, state, [ids for _, ids in self._feeds], self.seeds, self.options)
        if self.speculation is None:
            return DecodeBatch(*arguments)
        from statespan.generation.speculative import SpeculativeBatch

        batch = SpeculativeBatch(*arguments, self.speculation)
        self.report = batch.report
        return batch

    def _evaluate(self) -> None:
        """Looked at before every forward: another stream of the same model may have ended in between."""
        if self.model.training:
            self._was_training = [module for module in self.model.modules() if module.training]
            self.model.eval()

    @torch.inference_mode()
    def _prefill(self) -> tuple[Tensor | None, ModelState]:
        """Next logits [b v] and state of each prompt; equal prompts are fed once."""
        self._evaluate()
        rows = {feed: row for row, feed in enumerate(dict.fromkeys(self._feeds))}
        # The newest token waits to be fed: when none is generated it is the last of the prompt.
        prompts = [ids if self.options.max_new_tokens else ids[:-1] for _, ids in rows]
        logits, state = absorb(self.model, prompts, self._rows_of_state(rows), self.options.prefill_chunk_size)
        if len(rows) == len(self._feeds):
            return logits, state
        fork = torch.tensor([rows[feed] for feed in self._feeds], device=self.model.device)
        return None if logits is None else logits[fork], state.select(fork)

    def _rows_of_state(self, feeds: Iterable[tuple[int, tuple[int, ...]]]) -> ModelState:
        rows = [row for row, _ in feeds]
        same = rows == list(range(self._state.batch_size))
        return self._state if same else self._state.select(torch.tensor(rows))

    def _without_tokens(self, state: ModelState) -> Iterator[StreamEvent]:
        for index, (_, ids) in enumerate(self._feeds):
            end = self._end_state(state, index, ids[-1]) if self.options.return_state else None
            yield StreamEvent(index, "", None, None, "length", end)

    def _row(self, index: int) -> _Row:
        decoder = None
        if self.tokenizer is not None:
            decoder = TextDecoder(self.tokenizer, self._feeds[index][1])
        return _Row(index, decoder, StopStrings(self.options.stop_strings))

    def _choose(self, batch: "DecodeBatch | SpeculativeBatch", rows: list[_Row]) -> list[tuple[int, ...]]:
        try:
            new = batch.choose()
        except NonFiniteLogits as error:
            row = rows[error.row]
            raise UserError(
                f"prompt {row.index}, new token {row.count}: the largest logit is {error.maximum}; the weights or the "
                "state hold NaN or overflowed: check the checkpoint, or try dtype float32"
            ) from None
        if rows[0].count == 0:
            self.first_token_s = time.perf_counter()
        return new

    def _extend(self, row: _Row, token_id: int) -> str:
        """Count the token, find out whether it is the last one, and return the text that is certain now."""
        row.count += 1
        text = ""
        if token_id in self._eos_ids:
            row.finish_reason = "eos"
        elif token_id in self._stop_ids:
            row.finish_reason = "stop"
        elif row.decoder is not None:
            text = row.stops.push(row.decoder.push(token_id))
        if row.count == self.options.max_new_tokens and row.finish_reason is None:
            row.finish_reason = "length"
        if row.finish_reason is not None and row.decoder is not None:
            text += row.stops.push(row.decoder.flush()) + row.stops.flush()
        if row.stops.stopped:
            row.finish_reason = "stop"
        return text

    @torch.no_grad()
    def _end_state(self, state: ModelState, place: int, pending: int) -> GenerationState:
        """A copy of one row, made outside inference mode, so that it can be used inside and outside of it."""
        return GenerationState(state.select(torch.tensor([place])), pending)


def _tokenizer_of(model: LanguageModel) -> Tokenizer | None:
    """The model's own, or bytes for a vocabulary of 256, as where a checkpoint is loaded."""
    if model.tokenizer is not None:
        return model.tokenizer
    from statespan.checkpoints.tokenizer import byte_tokenizer  # late, so that importing `generate` stays quick

    return byte_tokenizer(model.config)
