"""A pure Mamba writes 100,000 tokens, at the end of sequences as long as that, in the memory of the first ones."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import Tensor

from statespan.generation import StreamEvent, generate, generate_stream
from statespan.layers.config import Mamba1Config
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

# Together the rows write 100,000 tokens, and each one's sequence ends 100,000 tokens long.
ROWS, STEPS, PROMPT = 16, 6_250, 93_750


def reachable_bytes(root: object) -> int:
    """Bytes of everything that `root` keeps alive, tensors' memory included, code left out."""
    seen: dict[int, object] = {}
    waiting, total = [root], 0
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType | BuiltinFunctionType):
            continue
        seen[id(thing)] = thing
        total += sys.getsizeof(thing) + (thing.untyped_storage().nbytes() if isinstance(thing, Tensor) else 0)
        waiting += gc.get_referents(thing)
    return total


def live_objects() -> tuple[int, int, int]:
    """Objects that the garbage collector knows, tensors among them, and blocks that Python has allocated."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(type(thing) is Tensor for thing in objects), sys.getallocatedblocks()


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

    prompts = [[2 + i % 200 for i in range(PROMPT)]] * ROWS
    stream = generate_stream(model, prompts, max_new_tokens=STEPS, temperature=0, **options)
    read(stream, 200 * ROWS)
    held, objects, resident = reachable_bytes(stream), live_objects(), resident_bytes()
    read(stream, (STEPS - 400) * ROWS)
    # A list with an entry a token would take 749,000 bytes, one with an entry a step 46,800; the states of all tokens
    # 42 MB.
    assert abs(reachable_bytes(stream) - held) < 3_000
    growth = [after - before for after, before in zip(live_objects(), objects, strict=True)]
    assert growth[0] < 300 and growth[1] < 3 and growth[2] < 3_000
    assert resident_bytes() - resident < 8_000_000
    last = read(stream, 200 * ROWS)
    assert last is not None and last.finish_reason == "length"
    assert last.state is not None and last.state.model_state.num_bytes == size
