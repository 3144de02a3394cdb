"""Jamba v0.1 (52B) and Mixtral 8x7B at full size on one GPU, through the serving engine's runner.

    python -m benchmarks.gpu_jamba jamba [mixtral] [--mode experts_int8] [--parts decode] [--prompt 140000]

Random weights, made on the card; int8 experts, the rest in bfloat16 (`--mode int8`: linear layers too). Prefill of a
long prompt in chunks and its continuation, decoding at several lengths and batches against the bytes that a step must
read, the longest context that fits, and the bytes of keys and values as the allocator counts them. Keys and values of
contexts that are only decoded from are random numbers.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from benchmarks.record import Row, report
from statespan.layers.linear import Int8Linear
from statespan.layers.moe import Int8Experts
from statespan.models.accounting import forward_flops, kv_bytes, state_bytes
from statespan.models.build import empty_model
from statespan.models.initialization import initialize
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset
from statespan.models.quantize import quantize
from statespan.serving.runner import Chunk, Runner
from statespan.serving.state_pool import StatePool

PRESETS = {"jamba": "jamba-v0.1", "mixtral": "mixtral-8x7b"}
BYTES_PER_S, FLOPS = 3.35e12, 989e12  # of an H100 SXM, bfloat16
PAGE, GIB = 64, 1 << 30
DECODE = ((8192, 1), (131_072, 1), (8192, 16), (131_072, 4), (131_072, 16))
PARTS = ("prefill", "decode", "longest", "bytes")
STEPS = 20


@dataclass
class Run:
    """One model on the card, and the rows of its table."""

    name: str
    mode: str
    chunk: int
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        start = time.perf_counter()
        self.model = full_size(PRESETS[self.name], self.mode)
        torch.cuda.synchronize()
        self.weights = torch.cuda.memory_allocated()
        self.add("load", time.perf_counter() - start, "s", f"weights {self.weights / GIB:.1f} GiB")

    def add(self, task: str, value: float, unit: str, note: str = "", spread: float = 0.0) -> None:
        print(f"{self.name} {self.mode}: {task}: {value:,.4g} {unit}  {note}", flush=True)
        self.rows.append(Row(task, f"{PRESETS[self.name]} {self.mode}", value, unit, spread, note))

    def pool(self, num_tokens: int, num_rows: int = 1) -> tuple[StatePool, Runner]:
        """Memory for so many tokens a row, in one piece each."""
        pages = num_rows * -(-num_tokens // PAGE) + 1
        pool = StatePool(self.model, num_rows, pages, PAGE)
        for row in range(num_rows):
            pool.reserve(row, num_tokens)
        return pool, Runner(self.model, pool)

    def prefill(self, num_tokens: int) -> None:
        """A prompt in chunks, then its continuation."""
        pool, runner = self.pool(num_tokens + 2 * STEPS)
        tokens = torch.randint(0, self.model.config.vocab_size, (num_tokens,)).tolist()
        runner.prefill([Chunk(0, tuple(tokens[: self.chunk]))])  # kernels are compiled
        pool.clear(0)
        pool.reserve(0, num_tokens + 2 * STEPS)
        torch.cuda.reset_peak_memory_stats()
        start, times, logits = time.perf_counter(), list[float](), torch.empty(0)
        for first in range(0, num_tokens, self.chunk):
            logits = runner.prefill([Chunk(0, tuple(tokens[first : first + self.chunk]))])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start - sum(times))
        total, peak = sum(times), torch.cuda.max_memory_allocated()
        assert bool(logits.isfinite().all())
        flops = sum(forward_flops(self.model.config, t) for t in range(512, num_tokens, 1024)) * 1024
        note = f"{total:.2f} s; first chunk {times[0]:.3f} s, last {times[-1]:.3f} s; peak {peak / GIB:.1f} GiB"
        note += f"; {flops / total / 1e12:.0f} of {FLOPS / 1e12:.0f} TFLOP/s"
        self.add(f"prefill {num_tokens} in chunks of {self.chunk}", num_tokens / total, "tok/s", note)
        free = (peak - self.weights - pool.num_bytes) / GIB
        self.add(f"working memory of a chunk of {self.chunk}", free, "GiB", "beside weights and states")
        self.time_steps(runner, 1, num_tokens, "continued: ")

    def decode(self, context: int, batch: int) -> None:
        pool, runner = self.pool(context + 2 * STEPS, batch)
        pretend(pool, context)
        self.time_steps(runner, batch, context, "")

    def time_steps(self, runner: Runner, batch: int, context: int, prefix: str) -> None:
        """Steps of all rows against the bytes of weights, keys, values and states that one must read."""
        ids = torch.randint(0, self.model.config.vocab_size, (batch,), device="cuda")
        runner.decode(ids)
        runner.decode(ids)  # captures
        assert bool(runner.decode(ids).isfinite().all())
        times: list[float] = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS // 4):
                runner.decode(ids)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / (STEPS // 4))
        median = sorted(times)[1]
        floor = step_bytes(self.model, batch, context) / BYTES_PER_S
        note = f"{median * 1e3:.2f} ms a step; bytes' floor {floor * 1e3:.2f} ms: {floor / median:.0%}"
        self.add(f"{prefix}decode at {context}, batch {batch}", batch / median, "tok/s", note, max(times) / median - 1)

    def key_value_bytes(self, context: int) -> None:
        """As the allocator counts them."""
        before = torch.cuda.memory_allocated()
        pool = StatePool(self.model, 1, context // PAGE, PAGE)
        seen = torch.cuda.memory_allocated() - before
        constant = state_bytes(self.model.config) / GIB
        note = f"computed {kv_bytes(self.model.config, context) / GIB:.3f}; with constant states of {constant:.3f}"
        self.add(f"allocated for {context} tokens", seen / GIB, "GiB", note)
        del pool

    def longest(self) -> None:
        """The last chunk and a few steps of the longest prompt that fits, in multiples of 65,536 tokens."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        a_token = kv_bytes(self.model.config, 1)
        for reserve in (2.5, 3.5, 4.5):
            context = int((free - reserve * GIB) / a_token) // 65_536 * 65_536
            try:
                pool, runner = self.pool(context + self.chunk + 64)
                pretend(pool, context)
                tokens = torch.randint(0, self.model.config.vocab_size, (self.chunk,)).tolist()
                torch.cuda.synchronize()
                start = time.perf_counter()
                runner.prefill([Chunk(0, tuple(tokens))])
                torch.cuda.synchronize()
                seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / GIB
                note = f"peak {peak:.1f} GiB; its last chunk of {self.chunk} takes {seconds:.2f} s"
                self.add("longest context that fits", context + self.chunk, "tokens", note)
                self.time_steps(runner, 1, context + self.chunk, "longest: ")
                return
            except torch.OutOfMemoryError:
                pool = runner = None
                torch.cuda.empty_cache()


def full_size(name: str, mode: str) -> LanguageModel:
    """Random weights on the card, int8 ones drawn as such, so that nothing of full precision is ever there."""
    config = preset(name)
    model = quantize(empty_model(config, device="meta", dtype=torch.bfloat16), mode).to_empty(device="cuda")  # type: ignore[arg-type]  # a mode's name
    initialize(model, config, 0, "cuda")
    for module in model.modules():
        match module:
            case Int8Experts():
                fill(module.up_proj, module.up_scale)
                fill(module.down_proj, module.down_scale)
            case Int8Linear() if module.scale is not None:
                fill(module.weight, module.scale)
            case nn.Module():
                continue
    return model.eval()


def step_bytes(model: LanguageModel, batch: int, context: int) -> float:
    """What a step must read and write at the least: all weights, but of the experts those that the rows choose."""
    config = model.config
    weights = 0.0
    experts = 1 - (1 - config.moe.top_k / config.moe.num_experts) ** batch  # the share that random choices meet
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name != "embedding.weight" or config.tie_embeddings:
            weights += tensor.nbytes * (experts if ".experts." in name else 1)
    return weights + batch * (kv_bytes(config, context) + 2 * state_bytes(config))


def fill(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Uniform within 1 / sqrt(inputs), as nn.Linear's."""
    for part in weight.view(-1, weight.shape[-1]).split(1 << 16):
        part.random_(-127, 128)
    scale.fill_(weight.shape[-1] ** -0.5 / 127)


def pretend(pool: StatePool, context: int) -> None:
    """Rows with so many tokens that nobody fed: random keys and values, in place."""
    for part in pool._kv.flatten(0, 1).split(64):
        part.normal_()
    for row in range(pool.num_rows):
        pool._set_length(row, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=PRESETS)
    parser.add_argument("--mode", default="experts_int8", choices=("experts_int8", "int8"))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--prompt", type=int, default=140_000)
    parser.add_argument("--chunk", type=int, default=8192)
    options = parser.parse_args()
    for name in options.models:
        measure(Run(name, options.mode, options.chunk), options.parts, options.prompt)
        torch.cuda.empty_cache()


def measure(run: Run, names: list[str], prompt: int) -> None:
    """These parts of the table."""
    parts: dict[str, list[Callable[[], None]]] = {
        "prefill": [lambda: run.prefill(prompt)],
        "decode": [lambda shape=shape: run.decode(*shape) for shape in DECODE],
        "longest": [run.longest],
        "bytes": [lambda: run.key_value_bytes(262_144)],
    }
    for part in (part for name in names for part in parts[name]):
        try:
            part()
        except torch.OutOfMemoryError as error:
            print(f"{run.name}: does not fit: {str(error).splitlines()[0][:120]}", flush=True)
        torch.cuda.empty_cache()
    report("gpu_jamba", run.rows, ["statespan", "torch", "triton"])


if __name__ == "__main__":
    main()
