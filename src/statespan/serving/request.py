"""What clients of the engine send and get: Request in, Events out."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from statespan.errors import UserError
from statespan.generation.batch import TokenLogprob
from statespan.generation.options import GenerationOptions

if TYPE_CHECKING:
    from statespan.serving.constraint import Constraint

FinishReason = Literal["stop", "length", "eos", "cancelled", "deadline", "error"]


class RequestRefused(UserError):
    """A request that this engine can never serve: too long for its memory, empty, or with options it lacks."""


class QueueFull(UserError):
    """As many requests wait as may; the client should come back later."""


def _random_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued. `options` are those of `generate`, and so are the tokens that come with a seed.

    Example:
        >>> Request((1, 2, 3), GenerationOptions(max_new_tokens=4, temperature=0), id="first").priority
        0
    """

    prompt: tuple[int, ...]
    options: GenerationOptions = GenerationOptions()
    id: str = field(default_factory=_random_id)
    priority: int = 0  # larger first
    deadline_s: float | None = None  # from submission; the reply ends with finish_reason "deadline"
    num_samples: int = 1  # n: the prompt is prefilled once and its state forked; sample i takes seed + i
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])  # token id: added to its logit
    constraint: "Constraint | None" = None  # what may come next (a JSON schema, a regex); forked for each sample
    reuse: bool = True  # look up and feed the prefix cache


@dataclass(frozen=True, slots=True)
class Usage:
    """What one sample took. The prompt is prefilled once for all samples of a request."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int
    queue_s: float  # from submission to admission
    first_token_s: float  # from submission to the first token; 0 where none came
    total_s: float  # from submission to the end


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of one sample; its last event has a finish_reason."""

    request_id: str
    index: int  # which sample
    token_ids: tuple[int, ...]  # one token, or several where they were speculated; none in an end without a token
    text: str  # what they complete; may be "", and at the end carries what was held back
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, with the option logprobs
    finish_reason: FinishReason | None = None
    usage: Usage | None = None  # with the sample's last event
    error: str | None = None  # with finish_reason "error": one line
