"""Replicas under Ray Serve: affinity, the death of one under load, what it listens at, and what it leaves behind."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import statespan
from statespan.checkpoints.tokenizer import ByteTokenizer
from statespan.errors import UserError
from statespan.generation.generate import generate
from statespan.generation.options import GenerationOptions
from statespan.layers.config import AttentionConfig, Mamba1Config
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.serving.replica_events import Refused, ReplicaEvents
from statespan.serving.request import Event, QueueFull, Request, RequestRefused, Usage

PATIENCE_S = 600  # until what does not happen is a failure, on a busy machine
PROGRAM = "import sys; from statespan.cli import main; sys.exit(main())"
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    layers=tuple(LayerSpec.from_text(text) for text in ("mamba1", "attention")),
    mamba1=Mamba1Config(state_size=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = build(CONFIG, seed=3).eval()
    model.tokenizer = ByteTokenizer()
    return model


def request(text: str, **options: Any) -> Request:
    return Request(tuple(text.encode()), GenerationOptions(**options))


def children(pid: int) -> dict[int, str]:
    """Processes below this one, by id, without those that only wait to be read."""
    table = [
        line.split(None, 3)
        for line in subprocess.check_output(["ps", "-eo", "pid,ppid,stat,args"], text=True).splitlines()[1:]
    ]
    found, parents = dict[int, str](), {pid}
    for _ in range(8):
        for child, parent, state, words in table:
            if int(parent) in parents and not state.startswith("Z") and not words.startswith("ps "):
                found[int(child)] = words
        parents |= set(found)
    return found


def listening(pids: set[int]) -> set[str]:
    """The addresses at which these processes listen."""
    sockets: dict[str, str] = {}
    for table, size in (("tcp", 8), ("tcp6", 32)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[fields[9]] = fields[1][:size]
    found: set[str] = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:[") and target[8:-1] in sockets:
                found.add(sockets[target[8:-1]])
    return found


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_replicas(model: LanguageModel, tmp_path: Path) -> None:
    """One `statespan serve --replicas 2` from start to end: Ray takes its time to begin."""
    statespan.save(model, tmp_path / "tiny")
    words = [
        "serve",
        str(tmp_path / "tiny"),
        "--port",
        "0",
        "--replicas",
        "2",
        "--page-bytes",
        "1M",
        "--max-rows",
        "16",
    ]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *words], stderr=stream)
    left: dict[int, str] = {}
    try:
        wait_for(lambda: '"url"' in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        url = next(json.loads(line)["url"] for line in log.read_text().splitlines() if '"url"' in line)
        left = children(process.pid)
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            _check_replies(client, model)
            _check_affinity(client)
            addresses = listening({process.pid, *left})
            assert addresses and addresses <= LOOPBACK, addresses
            _check_death_under_load(client, model, left)
        left |= children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        wait_for(lambda: not any(runs(pid) for pid in left))
    finally:
        process.kill()
        process.wait()
        for pid in left:  # only where the test failed
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


def complete(client: httpx.Client, prompt: str, session: str = "", **body: Any) -> httpx.Response:
    headers = {"X-Session-Id": session} if session else {}
    return client.post("/v1/completions", json={"model": "tiny", "prompt": prompt} | body, headers=headers)


def _check_replies(client: httpx.Client, model: LanguageModel) -> None:
    for options in ({"temperature": 0.0}, {"seed": 4}):
        choice = complete(client, "Hello", max_tokens=10, **options).json()["choices"][0]
        assert choice["text"] == generate(model, "Hello", max_new_tokens=10, **options).text
        assert choice["finish_reason"] == "length"
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    assert complete(client, "x", response_format=wanted).json()["choices"][0]["text"] in ('"yes"', '"no"')
    wanted["json_schema"]["schema"] = {"type": 1}  # type: ignore[index]  # a nested dict
    assert "schema cannot be used" in complete(client, "x", response_format=wanted).json()["error"]["message"]
    assert complete(client, "x", max_tokens=60000).status_code == 422  # more than the replica's pages
    vectors = client.post("/v1/embeddings", json={"model": "tiny", "input": ["one", "two"]}).json()["data"]
    assert len(vectors) == 2 and len(vectors[0]["embedding"]) == 32


def _check_affinity(client: httpx.Client) -> None:
    """A session's second turn finds the first one's state; sessions are spread over both replicas."""
    for session in [f"s{number}" for number in range(12)]:
        prompt = f"A conversation of {session}, which goes on for a while."
        complete(client, prompt, session, max_tokens=8, temperature=0)
        usage = complete(client, prompt, session, max_tokens=2, temperature=0).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > len(prompt) - 10, session
    counts = requests_by_replica(client)
    assert len(counts) == 2 and all(counts.values()), counts


def _check_death_under_load(client: httpx.Client, model: LanguageModel, processes: dict[int, str]) -> None:
    """Every accepted request gets the text that it would have got; the service heals."""
    victims = [pid for pid, words in processes.items() if words.startswith("ray::ServeReplica")]
    assert len(victims) == 2
    before = requests_by_replica(client)
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        body = {"model": "tiny", "prompt": f"Request {number}", "max_tokens": 60, "seed": number, "stream": True}
        headers = {"X-Session-Id": str(number)}
        with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        texts[number] = "".join(choice["text"] for choice in choices)
        assert choices[-1]["finish_reason"] == "length"

    with ThreadPoolExecutor(16) as pool:
        replies = [pool.submit(ask, number) for number in range(16)]
        wait_for(lambda: sum(requests_by_replica(client).values()) >= sum(before.values()) + 8)
        os.kill(victims[0], signal.SIGKILL)
        [reply.result() for reply in replies]
    for number in range(16):
        assert texts[number] == generate(model, f"Request {number}", max_new_tokens=60, seed=number).text
    wait_for(lambda: len(requests_by_replica(client)) == 2)
    assert set(requests_by_replica(client)) != set(before), "the dead one was not replaced"


def requests_by_replica(client: httpx.Client) -> dict[str, float]:
    found = re.findall(r'^statespan_engine_requests_total{replica="(\w+)"} (.+)$', client.get("/metrics").text, re.M)
    return {replica: float(count) for replica, count in found}


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


class FakeBackend:
    """Gives each attempt's answers in turn; an exception among them is raised."""

    closing = False

    def __init__(self, *attempts: list[Any]) -> None:
        self.attempts, self.requests, self.forgotten = list(attempts), list[Request](), 0

    def submit(self, request: Request, grammar: Any, session: str) -> Any:
        self.requests.append(request)
        return self._answers(self.attempts.pop(0))

    async def _answers(self, answers: list[Any]) -> AsyncIterator[Any]:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def forget(self, events: ReplicaEvents) -> None:
        self.forgotten += 1


def dead() -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError()


def said(*tokens: int, index: int = 0, end: bool = False) -> list[Event]:
    usage = Usage(1, 0, len(tokens), 0, 0, 0) if end else None
    return [Event("r", index, tokens, bytes(tokens).decode(), (), "length" if end else None, usage)]


async def read(backend: FakeBackend, num_samples: int = 1) -> list[Event]:
    asked = replace(request("x", seed=1), num_samples=num_samples)
    events = ReplicaEvents(backend, asked, None, "s")  # type: ignore[arg-type]  # stands for a ReplicaBackend
    await events.open()
    return [event async for event in events]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statespan.serving.replica_events.WAIT_S", 0)


@pytest.mark.ray
def test_a_repeated_reply_goes_on_where_it_broke_off() -> None:
    # The second replica gives its tokens in other groups, as speculation may.
    backend = FakeBackend(
        [[], said(65), said(66, 67), said(97, index=1), dead()],
        [[], said(65, 66), said(97, 98, index=1, end=True), said(67, 68), said(69, end=True)],
    )
    events = asyncio.run(read(backend, num_samples=2))
    for index, tokens in ((0, [65, 66, 67, 68, 69]), (1, [97, 98])):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == tokens
        assert "".join(event.text for event in mine) == bytes(tokens).decode()
        assert [event.finish_reason for event in mine if event.finish_reason] == ["length"]
    assert len({request.id for request in backend.requests}) == 2 and backend.forgotten


@pytest.mark.ray
def test_a_reply_that_cannot_be_repeated_ends_in_an_error() -> None:
    for second in ([[], said(65), said(99)], [[], said(65), said(end=True)]):
        events = asyncio.run(read(FakeBackend([[], said(65), said(66), dead()], second)))
        assert events[-1].finish_reason == "error" and "could not repeat" in str(events[-1].error)
        assert [event.token_ids for event in events] == [(65,), (66,), ()]


@pytest.mark.ray
def test_deaths_before_the_first_event_and_too_many_of_them() -> None:
    assert [
        event.text for event in asyncio.run(read(FakeBackend([dead()], [[], dead()], [[], said(65, end=True)])))
    ] == ["A"]
    with pytest.raises(RequestRefused, match="no replica"):
        asyncio.run(read(FakeBackend(*[[dead()]] * 10)))
    events = asyncio.run(read(FakeBackend([[], said(65)], *[[dead()]] * 10)))
    assert events[-1].finish_reason == "error"


@pytest.mark.ray
def test_refusals_come_through() -> None:
    for error in (QueueFull("full"), RequestRefused("too long"), UserError("bad")):
        with pytest.raises(type(error), match=str(error)):
            asyncio.run(read(FakeBackend([Refused.of(error)])))
