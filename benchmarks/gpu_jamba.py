"""Jamba v0.1 (52B) and Mixtral 8x7B at full size on one GPU, through the serving engine's runner.

    python -m benchmarks.gpu_jamba jamba [mixtral] [--mode experts_int8] [--parts decode] [--ends 131072:512:1]

Random weights, made on the card; int8 experts, the rest in bfloat16 (`--mode int8`: linear layers too; `--mode
bfloat16`: nothing). Prompts in chunks and their continuations from end to end, decoding at several lengths and batches
against the bytes that a step must read, the longest context that fits, and the bytes of keys and values as the
allocator counts them. Keys and values of contexts that are only decoded from are random numbers.
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
MODES = ("experts_int8", "int8", "bfloat16")
FLOPS = 989e12  # of an H100 or H200 SXM, bfloat16
PAGE, GIB = 64, 1 << 30
ENDS = ("8192:512:1,4,16", "131072:512:1")
DECODE = ("8192:1", "8192:16", "131072:1", "131072:4", "131072:8")
PARTS = ("ends", "decode", "longest", "bytes")
STEPS = 20
LAST_CHUNK = 2048  # tokens, of the longest context's prompt


def bytes_per_s() -> float:
    """Of the card's memory."""
    return 4.8e12 if "H200" in torch.cuda.get_device_name() else 3.35e12


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

    def warm_up(self) -> None:
        """Kernels are compiled."""
        runner = self.pool(2 * self.chunk)[1]
        start = time.perf_counter()
        for _ in range(2):
            self.prefill(runner, 0, self.chunk)
        self.add("first two chunks", time.perf_counter() - start, "s", "compiling included")

    def prefill(self, runner: Runner, row: int, num_tokens: int) -> list[float]:
        """A prompt in chunks: seconds of each."""
        tokens = torch.randint(0, self.model.config.vocab_size, (num_tokens,)).tolist()
        times, logits = list[float](), torch.empty(0)
        for first in range(0, num_tokens, self.chunk):
            start = time.perf_counter()
            logits = runner.prefill([Chunk(row, tuple(tokens[first : first + self.chunk]))])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        assert bool(logits.isfinite().all())
        return times

    def end_to_end(self, context: int, new: int, batches: list[int]) -> None:
        """Prompts of so many tokens and so many greedy ones after them, for each batch."""
        pool, runner = self.pool(context + new, max(batches))
        torch.cuda.reset_peak_memory_stats()
        times = [self.prefill(runner, row, context) for row in range(max(batches))]
        peak = torch.cuda.max_memory_allocated()
        total, flops = sum(times[-1]), prompt_flops(self.model, context)
        note = f"{total:.2f} s; first chunk {times[-1][0]:.3f} s, last {times[-1][-1]:.3f} s; peak {peak / GIB:.1f} GiB"
        note += f"; {flops / total / 1e12:.0f} of {FLOPS / 1e12:.0f} TFLOP/s"
        self.add(f"prefill {context} in chunks of {self.chunk}", context / total, "tok/s", note)
        free = (peak - self.weights - pool.num_bytes) / GIB
        self.add(f"working memory of a chunk of {self.chunk}", free, "GiB", "beside weights and states")
        prompts = [pool.snapshot(row) for row in range(max(batches))]
        for batch in batches:
            for row in range(batch):
                pool.clear(row)
                pool.restore(row, prompts[row])
                pool.reserve(row, context + new)
            self.generate(runner, batch, context, new, sum(map(sum, times[:batch])))
        for prompt in prompts:
            pool.release(prompt)

    def generate(self, runner: Runner, batch: int, context: int, new: int, prefill_s: float) -> None:
        """Greedy tokens after prompts that took so long."""
        ids, start, warm = torch.zeros(batch, dtype=torch.int64, device="cuda"), 0.0, 4
        for step in range(new):
            if step == warm:  # the graph is captured
                torch.cuda.synchronize()
                start = time.perf_counter()
            ids = runner.decode(ids).argmax(dim=1)
        torch.cuda.synchronize()
        step_s = (time.perf_counter() - start) / (new - warm)
        peak, shape = torch.cuda.max_memory_allocated() / GIB, f"{context} + {new}, batch {batch}"
        floor_s = step_bytes(self.model, batch, context + new // 2) / bytes_per_s()
        note = f"{step_s * 1e3:.2f} ms a step; bytes' floor {floor_s * 1e3:.2f} ms: {floor_s / step_s:.0%}"
        self.add(f"decode of {shape}", batch / step_s, "tok/s", note)
        least = batch * prompt_flops(self.model, context) / FLOPS + new * floor_s
        note = (
            f"prefill {prefill_s:.2f} s, decode {new * step_s:.2f} s; floor of both {least:.2f} s; peak {peak:.1f} GiB"
        )
        self.add(f"end to end {shape}", batch * new / (prefill_s + new * step_s), "tok/s", note)

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
        floor = step_bytes(self.model, batch, context) / bytes_per_s()
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
        """The last chunk and a few steps of the longest prompt that fits, in multiples of 65,536 tokens.

        Chunks are short: from some 4,000 tokens on int8 experts are widened first, which takes memory.
        """
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        cap = int(torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction(0))
        free = min(free, cap - torch.cuda.memory_reserved())
        a_token, chunk = kv_bytes(self.model.config, 1), LAST_CHUNK
        for reserve in (1.0, 1.5, 2.0, 3.0):
            context = int((free - reserve * GIB) / a_token) // 65_536 * 65_536 - chunk
            try:
                torch.cuda.reset_peak_memory_stats()
                pool, runner = self.pool(context + chunk + 64)
                pretend(pool, context)
                tokens = tuple(torch.randint(0, self.model.config.vocab_size, (chunk,)).tolist())
                seconds, logits = 0.0, torch.empty(0)
                for _ in range(2):  # kernels are compiled
                    pool.row_pages.set_length(0, context)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    logits = runner.prefill([Chunk(0, tokens)])
                    torch.cuda.synchronize()
                    seconds = time.perf_counter() - start
                assert bool(logits.isfinite().all())
                peak = torch.cuda.max_memory_allocated() / GIB
                held = pool.num_bytes / GIB
                note = f"peak {peak:.1f} GiB: weights {self.weights / GIB:.1f}, keys, values and states {held:.1f}"
                note += f"; its last chunk of {chunk} takes {seconds:.2f} s"
                self.add("longest context that fits", context + chunk, "tokens", note)
                self.time_steps(runner, 1, context + chunk, "longest: ")
                return
            except torch.OutOfMemoryError:
                pool = runner = None
                torch.cuda.empty_cache()


def full_size(name: str, mode: str) -> LanguageModel:
    """Random weights on the card, int8 ones drawn as such, so that nothing of full precision is ever there."""
    config = preset(name)
    model = empty_model(config, device="meta", dtype=torch.bfloat16)
    model = (model if mode == "bfloat16" else quantize(model, mode)).to_empty(device="cuda").requires_grad_(False)  # type: ignore[arg-type]  # a mode's name
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


def prompt_flops(model: LanguageModel, num_tokens: int) -> float:
    """Of a prompt's forward."""
    return sum(forward_flops(model.config, place) for place in range(512, num_tokens, 1024)) * 1024


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
    keys_and_values = pool._memory.kv  # pyright: ignore[reportPrivateUsage]  # nobody else writes pages unasked
    for part in keys_and_values.flatten(0, 1).split(64):
        part.normal_()
    for row in range(pool.num_rows):
        pool.row_pages.set_length(row, context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=PRESETS)
    parser.add_argument("--mode", default="experts_int8", choices=MODES)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--ends", nargs="+", default=ENDS, help="context:new tokens:batches")
    parser.add_argument("--decode", nargs="+", default=DECODE, help="context:batch")
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--memory-gib", type=float, help="use no more of the card")
    options = parser.parse_args()
    if options.memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_gib * GIB / total)
    for name in options.models:
        run = Run(name, options.mode, options.chunk)
        measure(run, options)
        del run
        torch.cuda.empty_cache()


def measure(run: Run, options: argparse.Namespace) -> None:
    """The parts of the table that were asked for."""
    ends = [[[int(n) for n in part.split(",")] for part in end.split(":")] for end in options.ends]
    shapes = [[int(n) for n in shape.split(":")] for shape in options.decode]
    parts: dict[str, list[Callable[[], None]]] = {
        "ends": [lambda c=c, n=n, b=b: run.end_to_end(c[0], n[0], b) for c, n, b in ends],
        "decode": [lambda shape=shape: run.decode(*shape) for shape in shapes],
        "longest": [run.longest],
        "bytes": [lambda: run.key_value_bytes(262_144)],
    }
    run.warm_up()
    for part in (part for name in options.parts for part in parts[name]):
        try:
            part()
        except torch.OutOfMemoryError as error:
            print(f"{run.name}: does not fit: {str(error).splitlines()[0][:120]}", flush=True)
        torch.cuda.empty_cache()
        report("gpu_jamba", run.rows, ["statespan", "torch", "triton"])
        run.rows.clear()


if __name__ == "__main__":
    main()
