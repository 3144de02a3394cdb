"""Decoding on one GPU: tokens a second of `statespan.generate`, and of its CUDA graph alone, next to the bytes' floor.

    python -m benchmarks.gpu_decode [--only mamba-130m] [--batch 1 64] [--goals]

Random weights in bfloat16, drawn on the device; prompts of 128 tokens and 128 new ones, greedy. The floor is the time
in which the weights of a token are read, and the rows' states read and written, at 3.0 TB/s.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import statespan
from benchmarks.record import Row, report
from statespan.generation.sampling import Sampling
from statespan.generation.stepper import Stepper
from statespan.models.accounting import count_parameters, state_bytes
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset

BYTES_PER_S = 3.0e12
PROMPT, NEW = 128, 128


@dataclass(frozen=True)
class Case:
    """A model, rows of a batch, and the tokens a second that a peer reached and that are wanted."""

    name: str
    batch: int
    peer: float = 0.0  # mamba-ssm 2.3.2 with CUDA graphs; for Jamba transformers 5.17
    goal: float = 0.0
    layers: int | None = None  # only the first of them

    @property
    def config(self) -> ModelConfig:
        config = preset(self.name)
        return config.replace(layers=config.layers[: self.layers])


CASES = (
    Case("mamba-130m", 1, 1_524, 3_500),
    Case("mamba-1.4b", 1, 442, 800),
    Case("mamba-1.4b", 64, 19_714),
    Case("mamba-2.8b", 1, 281, 430),
    Case("mamba-2.8b", 8),
    Case("mamba-2.8b", 64, 12_517, 20_000),
    Case("mamba-2.8b", 128, 19_991, 28_000),
    Case("mamba2-130m", 1),
    Case("mamba2-1.3b", 1),
    Case("mamba2-1.3b", 64),
    Case("jamba-v0.1", 1, 62, 350, layers=8),
)


def built(config: ModelConfig) -> LanguageModel:
    """A model with random weights; `build` would draw a Jamba in float32 first, which takes long."""
    model = statespan.build(config, device="meta", dtype=torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("A_log"):
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1.0 if "norm" in name or name.endswith(".D") else 0.0)
    return model.eval()


def floor_s(case: Case) -> float:
    """Of one step, for all rows."""
    config = case.config
    rows_of_embedding = 0 if config.tie_embeddings else config.padded_vocab_size
    weights = 2 * (count_parameters(config).active - rows_of_embedding * config.hidden_size)
    return (weights + 2 * case.batch * state_bytes(config)) / BYTES_PER_S


def seconds_a_step(model: LanguageModel, batch: int) -> tuple[float, float]:
    """Of `statespan.generate` after the first token, and its spread."""
    prompts: list[list[int]] = torch.randint(10, model.config.vocab_size, (batch, PROMPT)).tolist()
    times: list[float] = []
    for _ in range(4):  # the first one captures the graph
        found = statespan.generate(model, prompts, max_new_tokens=NEW, temperature=0, ignore_eos=True)
        times.append(max(one.timing.decode_s for one in found) / (NEW - 1))
    times = times[1:]
    return sorted(times)[len(times) // 2], (max(times) - min(times)) / min(times)


@torch.inference_mode()
def seconds_of_graph(model: LanguageModel, batch: int, steps: int = 100) -> tuple[float, float]:
    """Of one replay, with the sampling in it, and what the first two steps cost, which compile and capture."""
    stepper = Stepper(model, batch, Sampling(temperature=0))
    logits = torch.randn(batch, model.config.vocab_size, device="cuda")
    stepper.start(logits, model.new_state(batch), [], [], 2 * steps)
    torch.cuda.synchronize()
    started = time.perf_counter()
    stepper.advance()
    stepper.advance()
    torch.cuda.synchronize()
    capture_s = time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        stepper.advance()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps, capture_s


def rows_of(case: Case, model: LanguageModel) -> Iterator[Row]:
    """Of generate, and of the graph."""
    task = f"{case.name}{f', {case.layers} layers' if case.layers else ''}, batch {case.batch}, decode"
    seconds, spread = seconds_a_step(model, case.batch)
    goal = f"goal {case.goal:,.0f}, peer {case.peer:,.0f}" if case.goal else ""
    yield Row(task, "generate, bfloat16", case.batch / seconds, "tok/s", spread, goal)
    graph, capture = seconds_of_graph(model, case.batch)
    floor = floor_s(case)
    note = f"floor {floor * 1e3:.3f} ms, {graph / floor:.2f} x; first two steps {capture * 1e3:.0f} ms"
    yield Row(task, "graph, bfloat16", graph * 1e3, "ms", 0.0, note)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--batch", type=int, nargs="+", default=[case.batch for case in CASES], help="batch sizes")
    parser.add_argument("--goals", action="store_true", help="only what has a goal")
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.only in case.name and case.batch in asked.batch]
    cases = [case for case in cases if case.goal or not asked.goals]
    model: LanguageModel | None = None
    for before, case in zip((None, *cases), cases, strict=False):
        if model is None or before is None or before.name != case.name:
            del model
            gc.collect()
            torch.cuda.empty_cache()
            model = built(case.config)
        report("gpu_decode", list(rows_of(case, model)), ["statespan", "torch", "triton", "cuda-core"])


if __name__ == "__main__":
    main()
