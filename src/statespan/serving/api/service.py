"""Service: all that a route needs, and what several of them do."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from statespan.checkpoints.tokenizer import FileTokenizer
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel, Tokenizer
from statespan.serving.api.errors import ApiError
from statespan.serving.api.metrics import ServerMetrics
from statespan.serving.api.options import ServerOptions
from statespan.serving.api.token_text import TokenText
from statespan.serving.backend import Backend
from statespan.serving.chat_template import ChatTemplate

LONG_TEXT = 8192  # characters from which encoding is no matter of a moment


class Service:
    """One model behind HTTP.

    Args:
        backend: runs the requests.
        config: of the model.
        tokenizer: of the model; without one prompts are token ids, and replies too, as logprobs' token names.
        template: of chats; without one they are refused.
        model: the weights, where they are in this process.
        options: limits.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None = None,
        model: LanguageModel | None = None,
        options: ServerOptions = ServerOptions(),
    ) -> None:
        self.backend, self.config, self.tokenizer, self.template = backend, config, tokenizer, template
        self.model, self.options = model, options
        self.metrics = ServerMetrics()
        self.token_text = TokenText(tokenizer)
        self.created = int(time.time())
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.backend.ready and not self.draining

    def require(self, model: str) -> None:
        """Refuse a request for another model, or at a time when none is served."""
        if model != self.options.name:
            raise ApiError(
                404,
                f"there is no model {model[:80]!r} here; this server has {self.options.name!r}",
                param="model",
                code="model_not_found",
            )
        if not self.ready:
            state = "shutting down" if self.draining else "not ready"
            raise ApiError(503, f"the server is {state}", code="unavailable", headers={"Retry-After": "5"})

    async def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> tuple[int, ...]:
        """The token ids of a text; `special`: with those that the tokenizer itself adds."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; send token ids", param=param)

        def run() -> list[int]:
            if isinstance(tokenizer, FileTokenizer) and not special:
                return tokenizer.encode(text, add_special_tokens=False)
            return tokenizer.encode(text)

        ids = run() if len(text) < LONG_TEXT else await asyncio.to_thread(run)
        return self.checked(ids, param=param)

    def checked(self, ids: Sequence[int], *, param: str = "prompt") -> tuple[int, ...]:
        """A prompt's token ids, if the model can take them; BOS where there are none."""
        if not ids:
            bos = self.config.bos_token_id
            bos = self.tokenizer.bos_id if bos is None and self.tokenizer is not None else bos
            if bos is None:
                raise ApiError(400, f"{param} is empty, and the model has no BOS token to begin with", param=param)
            ids = [bos]
        if len(ids) > self.options.max_prompt_tokens:
            raise ApiError(
                422,
                f"{param} has {len(ids)} tokens; this server takes {self.options.max_prompt_tokens}",
                param=param,
                code="context_length_exceeded",
            )
        if (worst := max(ids)) >= self.config.vocab_size:
            raise ApiError(400, f"token id {worst} is beyond the vocabulary of {self.config.vocab_size}", param=param)
        return tuple(ids)


def _service(request: Request) -> Service:
    return request.app.state.service


ServiceDep = Annotated[Service, Depends(_service)]
