"""Generation of 128 tokens after prompts of 2,048 at growing batch, on one GPU: Mamba beside Transformers of its size.

    python -m benchmarks.gpu_generation [--only transformers] [--batches 1 16 64]

Mamba-1.4b and a Llama-style Transformer of as many parameters, both through `statespan.generate` (CUDA graphs, caches
that stay where they are), and transformers' Llama of the same shape through its own `generate`. Random weights in
bfloat16, random prompts, greedy. A figure is new tokens of all rows over the time of the whole call, prompts included,
as in figure 8 of the Mamba paper (arXiv 2312.00752); the note has the two parts.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import statespan
from benchmarks.gpu_decode import built
from benchmarks.record import Row, report
from statespan.models.presets import preset

PROMPT, NEW = 2048, 128
BATCHES = (1, 4, 16, 64, 128, 256)
MAMBA, TRANSFORMER = "mamba-1.4b", "transformer-1.4b"
SYSTEMS = (MAMBA, TRANSFORMER, "transformers")

Generate = Callable[[torch.Tensor], tuple[float, float]]  # prompts [b t] -> seconds of the prompts and of what follows


def ours(name: str) -> Generate:
    """`statespan.generate` of a preset."""
    model = built(preset(name))

    def run(prompts: torch.Tensor) -> tuple[float, float]:
        ids: list[list[int]] = prompts.tolist()
        found = statespan.generate(model, ids, max_new_tokens=NEW, temperature=0, ignore_eos=True)
        return found[0].timing.prefill_s, max(one.timing.decode_s for one in found)

    return run


def theirs() -> Generate:
    """transformers' `generate` of the same Transformer, as it comes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = preset(TRANSFORMER)
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=len(config.layers),
        num_attention_heads=config.attention.num_heads,
        intermediate_size=config.mlp.intermediate_size,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=PROMPT + NEW,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(shape).eval()
        torch.set_default_dtype(torch.float32)

    def generate(prompts: torch.Tensor, new: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def run(prompts: torch.Tensor) -> tuple[float, float]:
        first = generate(prompts, 1)
        return first, generate(prompts, NEW) - first

    return run


def rows(system: str, batches: tuple[int, ...]) -> Iterator[Row]:
    """Each batch size until memory is full; the better of two calls after a first one."""
    run = theirs() if system == "transformers" else ours(system)
    for batch in batches:
        prompts = torch.randint(10, 50_000, (batch, PROMPT), device="cuda")
        task = f"{NEW} tokens after {PROMPT}, batch {batch}"
        try:
            calls = [run(prompts) for _ in range(2 if system == "transformers" else 3)][1:]
        except torch.OutOfMemoryError:
            yield Row(task, system, 0, "tok/s", 0, "out of memory")
            return
        rates = [batch * NEW / sum(parts) for parts in calls]
        prefill, decode = min(calls, key=sum)
        note = f"prompts {prefill * 1e3:,.0f} ms, then {batch * (NEW - 1) / decode:,.0f} tok/s"
        yield Row(task, system, max(rates), "tok/s", (max(rates) - min(rates)) / max(rates), note)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SYSTEMS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    options = parser.parse_args()
    found: list[Row] = []
    for system in SYSTEMS if options.only is None else (options.only,):
        found += rows(system, tuple(options.batches))
        gc.collect()
        torch.cuda.empty_cache()
    report("gpu_generation", found, ["statespan", "torch", "triton", "cuda-core", "transformers"])


if __name__ == "__main__":
    main()
