"""A pure Mamba writes 100,000 tokens in the memory of the first ones."""

import gc
import os
import subprocess
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from statespan.generation import StreamEvent, generate, generate_stream
from statespan.layers.config import Mamba1Config
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

COUNT = 100_000


def resident_bytes() -> int:
    """Memory of this process as the operating system counts it."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


def read(stream: Iterator[StreamEvent], count: int) -> StreamEvent | None:
    """The last of the next `count` events; the others are let go."""
    event = None
    for event in islice(stream, count):  # noqa: B007  # wanted after the loop
        pass
    return event


def live_objects() -> tuple[int, int]:
    """How many objects the garbage collector knows, and how many tensors."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(type(thing) is torch.Tensor for thing in objects)


def traced_growth(stream: Iterator[StreamEvent]) -> int:
    """Bytes that Python objects take more after 2,000 tokens. Tracing is slow, so it is for a while only."""
    tracemalloc.start()
    try:
        read(stream, 1_000)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        read(stream, 2_000)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_100_000_tokens_grow_nothing(scripted: Any) -> None:
    config = ModelConfig(
        vocab_size=256,
        hidden_size=8,
        layers=(LayerSpec("mamba1"),),
        mamba1=Mamba1Config(state_size=4),
        tie_embeddings=False,
    )
    model, tokenizer = build(config), scripted({}).tokenizer
    options = {"tokenizer": tokenizer, "ignore_eos": True, "return_state": True, "stop": "never said"}
    size = generate(model, [1], max_new_tokens=3, **options).state.model_state.num_bytes

    stream = generate_stream(model, [1], max_new_tokens=COUNT, temperature=0, **options)
    read(stream, 5_000)
    assert traced_growth(stream) < 1_000  # a byte a token would be 2,000
    objects, resident = live_objects(), resident_bytes()
    read(stream, COUNT - 8_300)
    assert live_objects()[1] <= objects[1] + 2
    assert live_objects()[0] <= objects[0] + 200
    assert resident_bytes() - resident < 8_000_000  # keeping the state of every step would take 45 MB
    last = read(stream, 300)
    assert last is not None and last.finish_reason == "length"
    assert last.state is not None and last.state.model_state.num_bytes == size
