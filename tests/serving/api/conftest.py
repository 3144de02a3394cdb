"""A real server on a tiny model, and one whose engine follows a script."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.generation.batch import TokenLogprob
from statespan.inspection.tokens import TokenView
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.api.options import ServerOptions
from statespan.serving.api.server import DrainingServer, bind, configure
from statespan.serving.api.service import Service
from statespan.serving.backend import Grammar, LocalBackend
from statespan.serving.chat_template import PLAIN, ChatTemplate
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions
from statespan.serving.request import Event, FinishReason, Request, Usage

NAME = "tiny"
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    layers=tuple(LayerSpec.from_text(text) for text in ("mamba1+mlp", "attention+mlp", "mamba2")),
    mamba1=Mamba1Config(state_size=4),
    mamba2=Mamba2Config(head_dim=8, state_size=8, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MLPConfig(intermediate_size=32),
)
ENGINE = EngineOptions(num_pages=512, max_rows=8, max_waiting=64)
OPTIONS = ServerOptions(name=NAME, max_body_bytes=1 << 20, max_prompt_tokens=4096, max_new_tokens=1000, drain_s=1)


class Running:
    """A server in a thread of this process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.server = DrainingServer(configure(service), service)
        self._thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
        self._thread.start()
        end = time.monotonic() + 600
        while not self.server.started:
            assert time.monotonic() < end and self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def _run(self, sock: socket.socket) -> None:
        asyncio.run(self.server.serve(sockets=[sock]))

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json={"model": NAME} | body)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(120)
        assert not self._thread.is_alive()


def tiny_model(tokenizer: Any = None) -> LanguageModel:
    model = build(CONFIG, seed=3).eval()
    with torch.no_grad():  # so that greedy text depends on the past
        for name, parameter in model.named_parameters():
            if "mixer." in name and name.endswith("weight") and "norm" not in name:
                parameter.mul_(3)
    model.tokenizer = tokenizer or ByteTokenizer()
    return model


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return tiny_model()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts servers that end with the test: start(backend or model, template=..., **options)."""
    running: list[Running] = []

    def run(engine: Any, *, template: str | None = PLAIN, tokenizer: Any = None, **options: Any) -> Running:
        running.append(start_server(engine, template=template, tokenizer=tokenizer, **options))
        return running[-1]

    yield run
    for server in running:
        server.stop()


def start_server(engine: Any, *, template: str | None = PLAIN, tokenizer: Any = None, **options: Any) -> Running:
    is_model = isinstance(engine, LanguageModel)
    backend = LocalBackend(engine, ENGINE) if is_model else engine
    chat = None if template is None else ChatTemplate(template)
    service = Service(
        backend,
        config=CONFIG,
        tokenizer=tokenizer or ByteTokenizer(),
        template=chat,
        model=engine if is_model else None,
        options=replace(OPTIONS, **options),
    )
    return Running(service)


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    """One server for a file's tests that change nothing in it."""
    running = start_server(model)
    yield running
    running.stop()


class Scripted:
    """A backend that says `reply` to everything: a token a byte, or the given ids; it can wait and fail on the way."""

    def __init__(self, reply: str | Sequence[int] = "", *, finish: FinishReason = "eos", delay_s: float = 0) -> None:
        self.reply, self.finish, self.delay_s = reply, finish, delay_s
        self.ready = True
        self.refusal: Exception | None = None
        self.requests: list[Request] = []
        self.grammars: list[Grammar | None] = []
        self.sessions: list[str | None] = []
        self.cancelled: list[str] = []
        self.sent = 0

    async def start(self) -> None: ...

    async def stream(
        self, request: Request, *, grammar: Grammar | None = None, session: str | None = None
    ) -> "ScriptedEvents":
        self.requests.append(request)
        self.grammars.append(grammar)
        self.sessions.append(session)
        if self.refusal is not None:
            raise self.refusal
        return ScriptedEvents(self, request)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[3.0, 4.0] + [0.0] * (CONFIG.hidden_size - 2) for _ in prompts])

    async def score(self, prompt: Sequence[int], num_top: int) -> list[TokenLogprob | None]:
        return [None, *(TokenLogprob(-1.0, ((65, -0.5),)) for _ in prompt[1:])]

    async def token_view(self, ids: Sequence[int], layer: int) -> TokenView:
        raise NotImplementedError  # the playground has tests of its own

    async def metrics(self) -> Mapping[str, EngineMetrics]:
        return {"0": EngineMetrics(requests=len(self.requests), waiting=2, finished={"eos": 5})}

    async def close(self, *, drain_s: float = 0) -> None:
        self.ready = False


class ScriptedEvents:
    def __init__(self, backend: Scripted, request: Request) -> None:
        self._backend, self._request = backend, request
        self._events = self._generate()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        if not self._ended:
            self._backend.cancelled.append(self._request.id)
        await self._events.aclose()

    async def _generate(self) -> AsyncIterator[Event]:
        backend, request = self._backend, self._request
        reply = backend.reply
        pieces = [(b, chr(b)) for b in reply.encode()] if isinstance(reply, str) else [(i, "") for i in reply]
        pieces = pieces[: request.options.max_new_tokens]
        for index in range(request.num_samples):
            for token_id, text in pieces:
                if backend.delay_s:
                    await asyncio.sleep(backend.delay_s)
                backend.sent += 1
                scores = (TokenLogprob(-0.25, ((token_id, -0.25), (66, -3.0))),) if request.options.logprobs else ()
                yield Event(request.id, index, (token_id,), text, scores)
            usage = Usage(len(request.prompt), 1, len(pieces), 0, 0, 0)
            error = "the logits are not finite" if backend.finish == "error" else None
            self._ended = index == request.num_samples - 1
            yield Event(request.id, index, (), "", (), backend.finish, usage, error)


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted
