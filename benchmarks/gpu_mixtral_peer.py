"""Mixtral 8x7B in transformers on one GPU of 141 GB, bfloat16, beside `gpu_jamba mixtral --mode bfloat16`.

    python -m benchmarks.gpu_mixtral_peer [--prefill 8192 32768] [--decode 8192:1 8192:16] [--ways compiled]

Random weights, made on the card. Prefill is one forward over the prompt with a dynamic cache. Decoding takes a static
cache three ways: the model called from Python, the same call as a CUDA graph captured by hand, and `torch.compile` in
mode reduce-overhead, as `generate` does it, which takes a minute a batch. Keys and values that are only decoded from
are random numbers.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, StaticCache

from benchmarks.record import Row, report

STEPS = 20
WAYS = ("eager", "graph", "compiled")


def full_size() -> MixtralForCausalLM:
    """Random weights of the preset's sizes."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        options: dict[str, Any] = {"attn_implementation": "sdpa", "pad_token_id": 0}
        model = MixtralForCausalLM(MixtralConfig(**options))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def seconds(run: Callable[[], object], count: int = 1) -> float:
    """Of one call, from a median of three runs of `count`."""
    times: list[float] = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / count)
    return sorted(times)[1]


@torch.inference_mode()
def prefill(model: MixtralForCausalLM, num_tokens: int) -> Row:
    ids = torch.randint(0, model.config.vocab_size, (1, num_tokens), device="cuda")

    def run() -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    run()
    torch.cuda.reset_peak_memory_stats()
    value = seconds(run)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Row(
        f"prefill {num_tokens}",
        "transformers bfloat16",
        num_tokens / value,
        "tok/s",
        0,
        f"{value:.2f} s; peak {peak:.1f} GiB",
    )


@torch.inference_mode()
def decode(model: MixtralForCausalLM, context: int, batch: int, way: str) -> Row:
    cache = StaticCache(config=model.config, max_cache_len=context + 256)
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True) if way == "compiled" else model

    def run() -> torch.Tensor:
        return call(ids, past_key_values=cache, use_cache=True).logits

    model(ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers  # of the static kind
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    step: Callable[[], object] = run
    for _ in range(3):
        run()
    if way == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        step = graph.replay
    value = seconds(step, STEPS)
    note = f"{value * 1e3:.2f} ms a step, {way}"
    return Row(f"decode at {context}, batch {batch}, {way}", "transformers bfloat16", batch / value, "tok/s", 0, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", nargs="*", type=int, default=(8192, 32_768))
    parser.add_argument("--decode", nargs="*", default=("8192:1", "8192:4", "8192:16"), help="context:batch")
    parser.add_argument("--ways", nargs="+", default=("eager", "graph"), choices=WAYS, help="of decoding")
    options = parser.parse_args()
    start = time.perf_counter()
    model = full_size()
    torch.cuda.synchronize()
    print(f"load {time.perf_counter() - start:.1f} s, {torch.cuda.memory_allocated() / 2**30:.1f} GiB", flush=True)
    shapes = [[int(n) for n in shape.split(":")] for shape in options.decode]
    parts: list[Callable[[], Row]] = [lambda n=n: prefill(model, n) for n in options.prefill]
    parts += [lambda c=c, b=b, way=way: decode(model, c, b, way) for way in options.ways for c, b in shapes]
    for part in parts:
        try:
            report("gpu_mixtral_peer", [part()], ["transformers", "torch"])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:160]}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
