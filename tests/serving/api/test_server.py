"""Keys, hosts, sizes, queues, clients that leave, logs, metrics, drain and TLS."""

import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AuthenticationError, InternalServerError, RateLimitError

import statespan
from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.serving.api.logs import JsonFormatter
from statespan.serving.api.options import ServerOptions
from statespan.serving.api.server import bind
from statespan.serving.request import QueueFull, RequestRefused

NAME = "tiny"
PATIENCE_S = 600  # until what does not happen is a failure, on a busy machine
PROGRAM = "import sys; from statespan.cli import main; sys.exit(main())"

get, post = partial(httpx.get, timeout=PATIENCE_S), partial(httpx.post, timeout=PATIENCE_S)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_models_and_health(server: Any) -> None:
    (card,) = server.openai.models.list().data
    assert (card.id, card.object) == (NAME, "model")
    assert server.openai.models.retrieve(NAME).id == NAME
    assert server.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert server.http.get("/v1/completions").status_code == 405


def test_health_waits_for_the_engine(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x")
    running = start(backend)
    backend.ready = False
    assert running.http.get("/health").status_code == 503
    reply = running.post("completions", prompt="a")
    assert reply.status_code == 503 and reply.headers["retry-after"]


def test_embeddings_are_final_states_of_length_1(server: Any, model: LanguageModel) -> None:
    texts = ["One", "and another"]
    captured: list[torch.Tensor] = []
    handle = model.final_norm.register_forward_hook(lambda _module, _inputs, output: captured.append(output))
    with torch.inference_mode():
        [model(torch.tensor([list(text.encode())])) for text in texts]
    handle.remove()
    expected = [torch.nn.functional.normalize(output[0, -1], dim=-1).tolist() for output in captured]
    reply = server.openai.embeddings.create(model=NAME, input=texts)  # asks for base64
    plain = server.post("embeddings", input=[list(text.encode()) for text in texts]).json()
    for vector, data, want in zip(reply.data, plain["data"], expected, strict=True):
        assert vector.embedding == pytest.approx(want, abs=1e-4)
        assert data["embedding"] == pytest.approx(vector.embedding, abs=1e-6)
    assert reply.usage.prompt_tokens == sum(map(len, texts))
    assert server.post("embeddings", input="a", dimensions=7).status_code == 400
    assert server.post("embeddings", input=[]).status_code == 400


def test_api_keys(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("x"), api_keys=("first", "sécond"))
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/playground/model"):
        reply = running.http.get(path)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key", path
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/", "/playground/app.js", "/playground/style.css"):
        assert running.http.get(path).status_code == 200, path
    for wrong in ("Bearer wrong", "Bearer", "first", "Basic first", "Bearer first second", "Bearer FIRST"):
        assert running.http.get("/v1/models", headers={"Authorization": wrong}).status_code == 401, wrong
    for right in (b"Bearer first", b"bearer first", "Bearer sécond".encode()):
        assert running.http.get("/v1/models", headers={"Authorization": right}).status_code == 200, right
    with pytest.raises(AuthenticationError):
        running.openai.models.list()


def test_the_page_may_load_nothing_from_elsewhere(server: Any) -> None:
    reply = server.http.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "access-control-allow-origin" not in reply.headers


def test_other_host_names_are_refused(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("x"), allowed_hosts=("localhost", "[::1]", "127.0.0.1"))
    for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1:1"):
        assert running.http.get("/health", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.example:8000", ""):
        assert running.http.get("/health", headers={"Host": host}).status_code == 403, host


def test_bodies_that_are_too_large(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x")
    running = start(backend, max_body_bytes=1000)
    assert running.post("completions", prompt="a" * 900).status_code == 200
    reply = running.post("completions", prompt="a" * 1000)
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"

    def pieces() -> Any:  # without Content-Length
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(20):
            yield b"a" * 100
        yield b'"}'

    headers = {"Content-Type": "application/json"}
    assert running.http.post("/v1/completions", content=pieces(), headers=headers).status_code == 413
    assert len(backend.requests) == 1
    assert running.http.get("/health").status_code == 200


def test_bodies_that_are_too_slow(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("x"), body_timeout_s=0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert sock.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_full_queue_and_requests_without_hope(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x")
    running = start(backend)
    backend.refusal = QueueFull("64 requests wait")
    with pytest.raises(RateLimitError, match="64 requests wait") as caught:
        running.openai.completions.create(model=NAME, prompt="a")
    assert caught.value.response.headers["retry-after"] == "1"
    with pytest.raises(RateLimitError):
        running.openai.completions.create(model=NAME, prompt="a", stream=True)
    backend.refusal = RequestRefused("needs 99 pages of 10")
    reply = running.post("completions", prompt="a")
    assert reply.status_code == 422 and reply.json()["error"]["code"] == "context_length_exceeded"


def test_one_refused_prompt_cancels_the_others(start: Callable[..., Any], scripted: Any) -> None:
    class Third(scripted):  # type: ignore[misc]  # a fixture's class
        async def stream(self, request: Any, **options: Any) -> Any:
            if len(self.requests) == 2:
                raise QueueFull("full")
            return await super().stream(request, **options)

    backend = Third("x" * 100)
    assert start(backend).post("completions", prompt=["a", "b", "c"]).status_code == 429
    assert backend.cancelled == [request.id for request in backend.requests] and len(backend.cancelled) == 2


def test_an_error_of_the_engine(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("abc", finish="error"))
    with pytest.raises(InternalServerError, match="the logits are not finite"):
        running.openai.completions.create(model=NAME, prompt="a")
    lines = running.http.post("/v1/completions", json={"model": NAME, "prompt": "a", "stream": True}).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert "[DONE]" not in lines[-2]


def test_what_nobody_foresaw_tells_nothing(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x")
    backend.refusal = KeyError("/secret/path")
    reply = start(backend).post("completions", prompt="a")
    assert reply.status_code == 500
    assert "secret" not in reply.text and reply.json()["error"]["code"] == "internal_error"


def test_a_client_that_leaves_a_stream_cancels_it(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x" * 1000, delay_s=0.1)
    running = start(backend)
    stream = running.openai.completions.create(model=NAME, prompt="a", max_tokens=1000, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: len(backend.cancelled) == 1)
    assert backend.sent < 500


def test_a_client_that_leaves_while_it_waits_cancels_too(start: Callable[..., Any], scripted: Any) -> None:
    backend = scripted("x" * 1000, delay_s=0.1)
    running = start(backend)
    host, port = running.url.removeprefix("http://").split(":")
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 999})
    with socket.create_connection((host, int(port))) as sock:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        sock.sendall(f"{head}\r\n\r\n{body}".encode())
        wait_for(lambda: backend.sent > 0)
    wait_for(lambda: len(backend.cancelled) == 1)
    assert backend.sent < 500


def test_a_real_engine_is_free_again_when_clients_left(start: Callable[..., Any], model: LanguageModel) -> None:
    running = start(model)
    for _ in range(3):
        stream = running.openai.completions.create(model=NAME, prompt="a", max_tokens=1000, stream=True)
        next(iter(stream))
        stream.close()
    engine = running.service.backend.engine.engine
    wait_for(lambda: engine.metrics().decoding == 0 and engine.metrics().waiting == 0 and engine.idle)
    assert engine.metrics().finished["cancelled"] == 3


def test_signs_of_life_while_nothing_comes(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("ab", delay_s=0.35), keep_alive_s=0.02)
    text = running.post("completions", prompt="a", stream=True).text
    assert text.count(": still here\n\n") >= 4
    chunks = running.openai.completions.create(model=NAME, prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab"


def test_metrics(start: Callable[..., Any], scripted: Any) -> None:
    running = start(scripted("abc"))
    running.post("completions", prompt="hello")
    running.post("completions", prompt="hello", temperature=9)
    running.http.get("/x" * 50)
    wait_for(lambda: 'status="404"' in running.http.get("/metrics").text)
    lines = running.http.get("/metrics").text.splitlines()
    for line in (
        'statespan_http_requests_total{route="/v1/completions",status="200"} 1.0',
        'statespan_http_requests_total{route="/v1/completions",status="400"} 1.0',
        'statespan_http_requests_total{route="none",status="404"} 1.0',
        "statespan_first_token_seconds_count 1.0",
        "statespan_next_token_seconds_count 2.0",
        "statespan_prompt_tokens_sum 5.0",
        "statespan_reply_tokens_sum 3.0",
        'statespan_engine_requests_total{replica="0"} 1.0',
        'statespan_engine_waiting{replica="0"} 2.0',
        'statespan_engine_finished_total{reason="eos",replica="0"} 5.0',
    ):
        assert line in lines, line


@pytest.mark.parametrize("log_text", [False, True])
def test_logs(start: Callable[..., Any], scripted: Any, log_text: bool, caplog: pytest.LogCaptureFixture) -> None:
    running = start(scripted("reply"), log_text=log_text)
    with caplog.at_level(logging.INFO, "statespan.serving"):
        reply = running.http.post(
            "/v1/completions", json={"model": NAME, "prompt": "secret words"}, headers={"X-Request-Id": "mine.1"}
        )
        wait_for(lambda: any(record.message == "request" for record in caplog.records))
    assert reply.headers["x-request-id"] == "mine.1"
    line = next(JsonFormatter().format(record) for record in caplog.records if record.message == "request")
    fields = json.loads(line)
    assert fields["request_id"] == "mine.1" and fields["status"] == 200 and fields["path"] == "/v1/completions"
    assert (fields["prompt_tokens"], fields["completion_tokens"], fields["finish_reasons"]) == (12, 5, ["eos"])
    assert fields["duration_s"] >= 0 and fields["level"] == "info" and "\n" not in line
    assert ("secret words" in line and "reply" in line) == log_text
    odd = running.http.get("/health", headers={"X-Request-Id": 'a b"{'}).headers["x-request-id"]
    assert len(odd) == 32


def test_options_are_checked() -> None:
    for change in ({"max_body_bytes": 0}, {"keep_alive_s": 0}, {"drain_s": -1}, {"name": ""}, {"api_keys": ("",)}):
        with pytest.raises(UserError):
            ServerOptions(**change)


def test_an_address_in_use() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # or asyncio would let small pieces wait for 40 ms
        sock.listen()
        with pytest.raises(UserError, match="choose another --port"):
            bind("127.0.0.1", sock.getsockname()[1])
    with pytest.raises(UserError, match="no address"):
        bind("no.such.host.invalid", 1)
    for port in (-1, 65536, 99999):
        with pytest.raises(UserError, match=f"{port} is no port"):
            bind("127.0.0.1", port)


def test_drain_lets_replies_end_and_refuses_new_ones(start: Callable[..., Any], scripted: Any) -> None:
    class Slow(scripted):  # type: ignore[misc]  # a fixture's class
        async def close(self, *, drain_s: float = 0) -> None:
            while self.sent < 1000:
                await asyncio.sleep(0.01)

    backend = Slow("x" * 1000, delay_s=0.05)
    running = start(backend)
    texts: list[str] = []
    body = {"prompt": "a", "max_tokens": 1000}
    thread = threading.Thread(target=lambda: texts.append(running.post("completions", **body).text))
    thread.start()
    wait_for(lambda: backend.sent > 2)
    running.server.should_exit = True
    wait_for(lambda: running.service.draining)
    assert get(f"{running.url}/health").json() == {"status": "shutting down"}
    refused = post(f"{running.url}/v1/completions", json={"model": NAME, "prompt": "a"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
    backend.delay_s = 0  # the rest at once
    thread.join(PATIENCE_S)
    assert json.loads(texts[0])["choices"][0]["text"] == "x" * 1000


@pytest.fixture(scope="module")
def checkpoint(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    statespan.save(model, path)
    return path


def spawn(checkpoint: Path, *words: str, **environment: str) -> tuple["subprocess.Popen[str]", str]:
    """`statespan serve` in a process of its own, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", str(checkpoint), "--port", "0", "--page-bytes", "1M", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("{") and "url" in (fields := json.loads(line)):
            return process, fields["url"]
    raise AssertionError(f"no server: {process.wait()}")


def test_the_command_serves_and_ends_well(checkpoint: Path) -> None:
    process, url = spawn(checkpoint, "--chat-template", "plain", STATESPAN_API_KEYS="k1, k2")
    try:
        assert post(f"{url}/v1/completions", json={}).status_code == 401
        client = httpx.Client(base_url=url, headers={"Authorization": "Bearer k2"}, timeout=PATIENCE_S)
        body = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)  # the reply that runs is not cut off
        assert rest[-2:] == ["data: [DONE]", ""]
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_replies_that_outlast_the_drain_are_told(checkpoint: Path) -> None:
    process, url = spawn(checkpoint, "--drain", "0.1")
    try:
        body = {"model": "small", "prompt": "a", "max_tokens": 3000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()


def test_tls(checkpoint: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        shlex.split(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
            f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -out {cert} -keyout {key}"
        ),
        check=True,
        capture_output=True,
    )
    process, url = spawn(checkpoint, "--tls-cert", str(cert), "--tls-key", str(key))
    try:
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        assert get(f"{url}/health", verify=trusted).json() == {"status": "ready"}
        with pytest.raises(httpx.ConnectError):
            get(f"{url}/health")
    finally:
        process.kill()
        process.wait()
