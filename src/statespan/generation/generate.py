"""generate and generate_stream: prompts in, text out, over explicit state."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from statespan.dataclass_io import from_plain
from statespan.generation.batch import TokenLogprob
from statespan.generation.options import GenerationOptions
from statespan.generation.prompts import Prompt, Prompts, is_single
from statespan.generation.request import Request
from statespan.generation.state import GenerationState
from statespan.generation.streaming import FinishReason, StreamEvent
from statespan.layers.state import ModelState
from statespan.models.language_model import LanguageModel, Tokenizer

if TYPE_CHECKING:
    from statespan.generation.speculative import Speculation, SpeculationReport


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds. Prompts of one call are prefilled and decoded together."""

    prefill_s: float  # until the first new token
    decode_s: float  # from there to this prompt's last token
    tokens_per_s: float  # new tokens of this prompt after its first / decode_s; 0 when there are none


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt."""

    text: str  # without the prompt, the stop string and end tokens
    token_ids: tuple[int, ...]  # all new tokens, those of a stop string and the end token included
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int  # generates this again, for this prompt alone
    timing: Timing
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a new token
    state: GenerationState | None = None  # has absorbed prompt and new tokens, but for the newest: see GenerationState
    speculation: "SpeculationReport | None" = None  # of the whole call, with the option speculation


@overload
def generate(model: LanguageModel, prompt: str | list[int] | tuple[int, ...], **keywords: Any) -> Generation: ...


@overload
def generate(model: LanguageModel, prompt: list[str] | list[list[int]], **keywords: Any) -> list[Generation]: ...


@overload
def generate(model: LanguageModel, prompt: Tensor, **keywords: Any) -> Generation | list[Generation]: ...


def generate(
    model: LanguageModel,
    prompt: Prompt | Prompts,
    *,
    state: GenerationState | ModelState | None = None,
    tokenizer: Tokenizer | None = None,
    attention_mask: Tensor | None = None,
    speculation: "Speculation | None" = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Continue one prompt, or several together: prefill, then one token a step.

    By default tokens are sampled from the model as it is (temperature 1, no filters); `temperature=0` is greedy.
    Prompts of a batch do not influence each other; equal ones are prefilled once: `[prompt] * 8` draws 8 samples.

    Args:
        model: A LanguageModel; it runs in evaluation and inference mode.
        prompt: Text, token ids (list or [t] tensor), or several: a list of these or a [b t] tensor. "" becomes the
            model's BOS token.
        state: Where to go on: an earlier Generation's `.state`, or the `.state` of a forward. One row serves all
            prompts. It is not changed.
        tokenizer: Instead of `model.tokenizer`; a model of 256 tokens that has none reads and writes bytes.
        attention_mask: [b t], with a [b t] tensor of ids; 0 marks padding.
        speculation: Drafter and limits of speculative decoding (docs/speculation.md); the texts stay what they are.
        **options: Fields of GenerationOptions:
            max_new_tokens: Default 128; 0 only prefills.
            temperature, top_k, top_p, min_p: See Sampling, whose order they run in.
            repetition_penalty, frequency_penalty, presence_penalty: The same. The first counts all tokens of this call,
                the prompt and what follows it, the others what follows.
            stop, stop_token_ids, ignore_eos: A string or strings that end the text (they are left out of it), token
                ids that do, and whether to go on after the model's end tokens.
            seed: Of the first prompt; the prompt at index i takes seed + i. Default: from torch's global generator.
            prefill_chunk_size: Prompt tokens a forward, default 2048; it bounds the memory, not the result.
            return_state: Whether the results carry their state; see GenerationState for what it has absorbed.
            logprobs: True, or how many of the most likely tokens to report besides the chosen one.
    Returns:
        A Generation for one prompt, a list of them for several.
    Raises:
        UserError: an unknown option, a prompt that cannot be read, a state of another model, logits that are NaN.

    Example:
        >>> import statespan
        >>> model = statespan.build("jamba-tiny", seed=0)
        >>> statespan.generate(model, [1, 2, 3], max_new_tokens=5, temperature=0).finish_reason
        'length'
    """
    request = Request(model, prompt, state, tokenizer, attention_mask, _options(options), speculation)
    drafts = [_Draft() for _ in request.prompts]
    for event in request.events():
        drafts[event.index].add(event)
    generations = [draft.finished(request, index) for index, draft in enumerate(drafts)]
    return generations[0] if is_single(prompt) else generations


def generate_stream(
    model: LanguageModel,
    prompt: Prompt | Prompts,
    *,
    state: GenerationState | ModelState | None = None,
    tokenizer: Tokenizer | None = None,
    attention_mask: Tensor | None = None,
    speculation: "Speculation | None" = None,
    **options: Any,
) -> Iterator[StreamEvent]:
    """Like `generate`, but yields each token when it is there; nothing of what was yielded is kept.

    The texts of a prompt's events, joined, are `Generation.text`: characters come whole, and the beginning of a stop
    string is held back until it is certain that it is none. Mistakes in the arguments raise at once, not at the first
    token.

    Args:
        As for `generate`.
    Yields:
        A StreamEvent a token, prompt by prompt as they come; each prompt's last one has a finish_reason.
    Raises:
        UserError: as `generate`.

    Example:
        >>> import statespan
        >>> model = statespan.build("jamba-tiny", seed=0)
        >>> [event.finish_reason for event in statespan.generate_stream(model, [1, 2], max_new_tokens=2)]
        [None, 'length']
    """
    return Request(model, prompt, state, tokenizer, attention_mask, _options(options), speculation).events()


def _options(values: dict[str, Any]) -> GenerationOptions:
    return from_plain(GenerationOptions, values, "generate")


@dataclass
class _Draft:
    """What a Generation is made of, while it grows."""

    pieces: list[str] = field(default_factory=list[str])
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    last: StreamEvent | None = None
    end_s: float = 0.0

    def add(self, event: StreamEvent) -> None:
        self.pieces.append(event.text)
        if event.token_id is not None:
            self.ids.append(event.token_id)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.finish_reason is not None:
            self.last, self.end_s = event, time.perf_counter()

    def finished(self, request: Request, index: int) -> Generation:
        assert self.last is not None and self.last.finish_reason is not None  # every prompt gets a last event
        decode_s = self.end_s - request.first_token_s
        rate = (len(self.ids) - 1) / decode_s if len(self.ids) > 1 else 0.0
        return Generation(
            text="".join(self.pieces),
            token_ids=tuple(self.ids),
            prompt_token_ids=tuple(request.prompts[index]),
            finish_reason=self.last.finish_reason,
            seed=request.seeds[index],
            timing=Timing(request.first_token_s - request.start_s, decode_s, rate),
            logprobs=tuple(self.logprobs) if request.options.logprobs is not False else None,
            state=self.last.state,
            speculation=request.report,
        )
