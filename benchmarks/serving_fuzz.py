"""Hostile bodies against the server: no 500, no crash, one line of error, and right replies afterwards.

Run: python -m benchmarks.serving_fuzz [--bodies 10000] [--seed 1] [--url http://127.0.0.1:8000 --model NAME]
"""

import argparse
import json
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from statespan.serving.api.schemas import ChatBody, CompletionBody, EmbeddingsBody

PATHS = ("completions", "chat/completions", "embeddings")
STRINGS = ["", "a", "Hi", "\x00", "\ud800", "\uffff", "ü" * 50, "{{ 7*7 }}", "<tool_call>", "'; --", "a" * 3000, "../x"]
NUMBERS: list[float] = [0, 1, -1, 2, 0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63), 10**30, 255, 256]
NUMBERS += [float("nan"), float("inf")]
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *EmbeddingsBody.model_fields, "nonsense"})
SCHEMAS: list[Any] = [
    *({}, True, {"type": "object"}, {"type": 1}, {"$ref": "#"}, {"$ref": "http://x/y"}, {"enum": []}, {"pattern": "["}),
    *({"pattern": "(a+)+$"}, {"minLength": 10**9}, {"const": "\x00"}, {"type": "array", "minItems": 10**6}),
    {"allOf": [{"type": "string"}, {"type": "number"}]},
    {"properties": {"a" * 2000: {"$ref": "#/$defs/x"}}},
    {"anyOf": [{"$ref": "#"}] * 50},
]
NESTED = [b"[" * 3000, b'{"a":' * 300, b'"\\ud800"', b"1e999", b"9" * 5000]
EXPECTED = (200, 400, 404, 422)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and some that are none."""
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return draw.choice([None, True, False])
    if kind in (1, 2):
        return draw.choice(NUMBERS)
    if kind in (3, 4):
        return draw.choice(STRINGS)
    if kind in (5, 6):
        return [value(draw, depth + 1) for _ in range(draw.choice([0, 1, 2, 5, 70]))]
    return {draw.choice(STRINGS + FIELDS): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def right(draw: random.Random, path: str, model: str) -> dict[str, Any]:
    """A request with nothing wrong, or with a schema of doubt."""
    if path == "embeddings":
        return {"model": model, "input": draw.choice(["a", ["b"], [1]])}
    body: dict[str, Any] = {"model": model, "max_tokens": 2}
    if path == "completions":
        body["prompt"] = draw.choice(["a", ["a", "b"], [1, 2, 255], [[3], [4]]])
    else:
        body["messages"] = [{"role": "user", "content": draw.choice(STRINGS)}]
    if draw.random() < 0.2:
        schema = {"name": "x", "schema": draw.choice(SCHEMAS)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def hostile(draw: random.Random, model: str) -> tuple[str, bytes]:
    """A path, and a body that may be right, wrong in some fields, cut off, or no JSON at all."""
    path = draw.choice(PATHS)
    body = right(draw, path, model) if draw.random() < 0.9 else {}
    for _ in range(draw.randrange(4)):
        body[draw.choice(FIELDS)] = value(draw)
    text, trick = json.dumps(body).encode(), draw.random()
    if trick < 0.05:
        return path, text[: draw.randrange(len(text))]
    if trick < 0.08:
        return path, draw.randbytes(draw.randrange(200))
    if trick < 0.10:
        return path, text.replace(b'"a"', draw.choice(NESTED))
    if trick < 0.12:
        return path, json.dumps(value(draw)).encode()
    return path, text


def attack(url: str, model: str, count: int, seed: int, num_threads: int = 1) -> Counter[int]:
    """Send `count` hostile bodies; how often each status came.

    Raises:
        AssertionError: a status that should not be, or an error that is not told in one line.
    """
    statuses, lock = Counter[int](), threading.Lock()

    def run(thread: int) -> None:
        draw = random.Random(f"{seed} {thread}")
        with httpx.Client(base_url=url, timeout=120) as client:
            for _ in range(count // num_threads):
                path, content = hostile(draw, model)
                reply = client.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})
                assert reply.status_code in EXPECTED, (reply.status_code, path, content, reply.text)
                if reply.status_code != 200:
                    message = reply.json()["error"]["message"]
                    assert message and "\n" not in message and len(message) < 1500, (content, message)
                with lock:
                    statuses[reply.status_code] += 1

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(run, range(num_threads)))
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of a server without keys")
    parser.add_argument("--model", required=True, help="its name there")
    arguments = parser.parse_args()
    start = time.perf_counter()
    statuses = attack(arguments.url, arguments.model, arguments.bodies, arguments.seed, arguments.threads)
    seconds = time.perf_counter() - start
    health = httpx.get(f"{arguments.url}/health").json()["status"]
    told = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"{statuses.total()} bodies in {seconds:.0f} s: {told}; then {health}")


if __name__ == "__main__":
    main()
