"""Backend: what HTTP needs of an engine, wherever it runs; and LocalBackend, an engine in this process."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol

import torch
from torch import Tensor

from statespan.checkpoints import load
from statespan.errors import UserError
from statespan.generation.batch import TokenLogprob
from statespan.inspection.tokens import TokenView, token_view
from statespan.models.language_model import LanguageModel, Tokenizer
from statespan.models.quantize import Quantization
from statespan.serving.async_engine import AsyncEngine
from statespan.serving.constraint import Constraint, Vocabulary
from statespan.serving.engine import Engine
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, Request
from statespan.serving.scoring import score
from statespan.serving.tool_calls import CallFormat


@dataclass(frozen=True)
class Grammar:
    """What a reply must look like, as text: a constraint that can be sent to another process."""

    kind: Literal["json_object", "json_schema", "regex", "tool_calls"]
    text: str = ""  # the schema's JSON, or the pattern
    calls: CallFormat | None = None  # of "tool_calls"


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint and how to load it: a model that can be sent to another process."""

    path: Path
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None  # None: as stored
    quantize: Quantization | None = None
    draft: Path | None = None  # the checkpoint of a model that drafts for it

    def load(self) -> LanguageModel:
        """The model, as `statespan.load` gives it."""
        return load(self.path, device=self.device, dtype=self._dtype, quantize=self.quantize)

    def load_draft(self) -> LanguageModel | None:
        """The model that drafts, on the same device."""
        return None if self.draft is None else load(self.draft, device=self.device, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)


class Events(Protocol):
    """The events of one request, as an asynchronous iterator."""

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """Read no more; cancels the request if it goes on."""
        ...


class Backend(Protocol):
    """Takes requests and gives their events."""

    @property
    def ready(self) -> bool:
        """Whether requests are served."""
        ...

    async def start(self) -> None:
        """Begin to serve."""
        ...

    async def stream(self, request: Request, *, grammar: Grammar | None = None, session: str | None = None) -> Events:
        """Submit a request; closing its events cancels it. Requests of one `session` meet the same prefix cache.

        Raises:
            UserError: it is refused, QueueFull where too many wait.
        """
        ...

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """[n h] float32: the final norm's output at the last token of each prompt."""
        ...

    async def score(self, prompt: Sequence[int], num_top: int) -> list[TokenLogprob | None]:
        """The log-probability of each token of a prompt; None for the first."""
        ...

    async def token_view(self, ids: Sequence[int], layer: int) -> TokenView:
        """Step size, experts and log-probability of each token of a text, as one layer sees them."""
        ...

    async def metrics(self) -> Mapping[str, EngineMetrics]:
        """The engine's metrics, by replica."""
        ...

    async def close(self, *, drain_s: float = 0) -> None:
        """Refuse new requests, let the others go on for `drain_s`, then end them."""
        ...


class LocalBackend:
    """An engine on a thread of this process.

    Args:
        model: served from now on; nobody else may use it meanwhile but through `engine.call`.
        options: of the engine.
        draft: drafts for it, see Engine.
    """

    def __init__(
        self, model: LanguageModel, options: EngineOptions = EngineOptions(), draft: LanguageModel | None = None
    ) -> None:
        self.model = model
        self.engine = AsyncEngine(Engine(model, options, draft=draft))
        self._lock = Lock()

    @property
    def ready(self) -> bool:
        return self.engine.running

    async def start(self) -> None:
        await asyncio.to_thread(self.engine.engine.warm_up)
        self.engine.start()

    async def stream(self, request: Request, *, grammar: Grammar | None = None, session: str | None = None) -> Events:
        if grammar is not None:
            # A hostile schema may take a while to read: others go on meanwhile.
            request = replace(request, constraint=await asyncio.to_thread(self._constraint, grammar))
        return self.engine.stream(request)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return await self.engine.embed(prompts)

    async def score(self, prompt: Sequence[int], num_top: int) -> list[TokenLogprob | None]:
        return await self.engine.call(lambda: score(self.model, prompt, num_top))

    async def token_view(self, ids: Sequence[int], layer: int) -> TokenView:
        return await self.engine.call(lambda: token_view(self.model, ids, layer))

    async def metrics(self) -> Mapping[str, EngineMetrics]:
        return {"0": self.engine.engine.metrics()}

    async def close(self, *, drain_s: float = 0) -> None:
        await self.engine.close(drain_s=drain_s)

    def _constraint(self, grammar: Grammar) -> Constraint:
        with self._lock:
            vocabulary = self._vocabulary
        match grammar.kind:
            case "json_object":
                constraint = vocabulary.json_object()
            case "json_schema":
                constraint = vocabulary.json_schema(grammar.text)
            case "regex":
                constraint = vocabulary.regex(grammar.text)
            case "tool_calls":
                assert grammar.calls is not None  # it comes with its kind
                constraint = vocabulary.tool_calls(grammar.calls)
        constraint.mask()  # raises where no text fulfils it
        return constraint

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokenizer: Tokenizer | None = self.model.tokenizer
        if tokenizer is None:
            raise UserError("structured output needs a tokenizer, which this checkpoint lacks")
        config = self.model.config
        return Vocabulary(tokenizer, config.vocab_size, config.eos_token_ids)
