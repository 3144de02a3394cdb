"""Runs every GPU kernel at tiny shapes, for compute-sanitizer: `make sanitize`.

With names of ops or of PARTS, those only. Each tensor is an allocation of its own, so that memcheck sees what goes
beyond one; nothing is captured in graphs, which cannot be with such allocations.
"""

import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest.mock import patch

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before PyTorch is imported

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_bad_input import CASES, FINAL, LENGTH, NUMBERS, Case, Inputs, misaligned

from statespan import ops
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.models.quantize import quantize
from statespan.ops.dispatch import OPS
from statespan.ops.selective_scan import cuda_plan
from statespan.serving.runner import Chunk, Runner
from statespan.serving.state_pool import StatePool
from statespan.serving.verify import Verify

DEVICE = "cuda"
MIXED = ModelConfig(
    vocab_size=61,
    hidden_size=64,
    layers=tuple(LayerSpec.from_text(text) for text in ("mamba1+moe", "attention+mlp", "mamba2+moe")),
    mamba1=Mamba1Config(state_size=8, inner_norms=True),
    mamba2=Mamba2Config(head_dim=16, state_size=16),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MLPConfig(intermediate_size=96),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=32),
)
# Wide enough for the kernels that take blocks of one kind together: one row, and many.
STACKED = ModelConfig(
    vocab_size=61, hidden_size=512, layers=(LayerSpec.from_text("mamba1"),) * 2, mamba1=Mamba1Config(state_size=16)
)
WINDOW = MIXED.replace(attention=AttentionConfig(num_heads=4, num_kv_heads=2, rope_theta=100.0, sliding_window=3))
# What training's half blocks need for their conv and x_proj to be one kernel.
TRAINED = MIXED.replace(
    layers=tuple(LayerSpec.from_text(text) for text in ("mamba1", "mamba2", "mamba1+moe")),
    mamba1=Mamba1Config(state_size=16, dt_rank=16),
)
DECODED = [(MIXED, rows, quantized) for rows in (1, 3, 9, 20) for quantized in (False, True)]
DECODED += [(STACKED, rows, False) for rows in (1, 2, 9, 65, 200)]


def inputs_of(case: Case) -> Iterator[Inputs]:
    """Whole and odd shapes, both precisions, and segments."""
    plain = case.make(2)
    yield plain
    yield {name: misaligned(value) for name, value in plain.items()}
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in plain.items()}
    yield halves
    if case.options == FINAL:
        for kind in ("each its own, with padding", "two that take turns"):
            yield {**halves, "segments": NUMBERS[kind].cuda().expand(2, LENGTH)}
        # Long enough for chunks and splits.
        yield {
            name: value.repeat_interleave(64, dim=1) if value.shape[1:2] == (LENGTH,) else value
            for name, value in halves.items()
        }


def on_device(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    return build(config, device=DEVICE, dtype=dtype)


@torch.inference_mode()
def decode() -> None:
    """Some tokens through models."""
    for config, batch_size, quantized in DECODED:
        model = on_device(config, torch.bfloat16).eval()
        model = quantize(model) if quantized else model
        ids = torch.randint(0, 61, (batch_size, 9))
        decoder = model.decoder(batch_size)
        decoder.start(model(ids[:, :5], state=model.new_state(batch_size)).state, room=4)
        for token in ids[:, 5:].unbind(1):
            decoder(token)


@torch.inference_mode()
def serve() -> None:
    """A chunk of a prompt, a step, and several tokens verified, over pages and behind a window."""
    for config, rows in product((MIXED, WINDOW, STACKED), (1, 3, 30)):
        model = on_device(config, torch.bfloat16).eval()
        with torch.device("cpu"):  # where the host makes its own tensors
            pool = StatePool(model, rows, 4 * rows + 1, 4)
            runner, verify = Runner(model, pool), Verify(Runner(model, pool), 3)
            runner.prefill([Chunk(row, (1, 2, 3, 4, 5)[row % 3 :]) for row in range(rows)])
            for row in range(rows):
                pool.reserve(row, 12)
            runner.decode([7] * rows)
            verify([[1, 2, 3]] * rows, [3] * rows).commit(dict.fromkeys(range(rows), 2))


def train() -> None:
    """Half blocks forward and backward, with and without documents in a row."""
    model, ids = on_device(TRAINED, torch.float32), torch.randint(0, 61, (2, 150))
    for segments in (None, torch.arange(150).expand(2, -1) // 40):
        with torch.autocast(DEVICE, torch.bfloat16):
            model(ids, segments=segments, labels=ids).loss.backward()


def scan() -> None:
    """Every form of the scan, forward and backward, also where splits wait for each other."""
    forms = [
        (states, form)
        for states, (of_splits, _) in cuda_plan.FORMS_OF_SPLITS.items()
        for form in (*cuda_plan.FORMS[states], of_splits)
    ]
    for states, form in forms:
        with patch.object(cuda_plan.Scan, "forward_plan", lambda work, form=form: (form, 192)):
            scan_once(states)
    scan_backward(cuda_plan.IN_TURN, cuda_plan.WITH_DECAYS)
    waiting = {"multiprocessors": lambda device: 1, "_chained_split": lambda blocks, chunks, room: (64, 0.0)}
    for states in (8, 16, 64):
        with patch.multiple(cuda_plan, **waiting):
            scan_once(states)
    cuda_plan.scan_of.cache_clear()


def scan_roles() -> None:
    """The form in which warps hand registers over."""
    if cuda_plan.hands_over_registers(torch.device(DEVICE, 0)):
        scan_backward(cuda_plan.ROLES)


def scan_backward(*forms: cuda_plan.BackwardForm) -> None:
    """In one piece, and in splits."""
    for form, split in product(forms, (192, 64)):
        with patch.object(cuda_plan.Scan, "backward_plan", lambda work, number, plan=(form, split, False): plan):
            scan_once(16)
    cuda_plan.scan_of.cache_clear()


def scan_once(states: int) -> None:
    cuda_plan.scan_of.cache_clear()
    u, dt, z = (torch.randn(2, 150, 136, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    B, C = (torch.randn(2, 150, 1, states, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    A, D = -torch.rand(136, states), torch.randn(136)
    ops.selective_scan(u, dt, A, B, C, D, z, dt_bias=D, backend="cuda").sum().backward()


def route() -> None:
    """Experts of many rows each, forward and backward, and with int8 weights; and what sampling keeps."""
    for tokens in (70, 400, 1100):
        x, index, weight = torch.randn(tokens, 64), torch.rand(tokens, 4).argsort(1)[:, :2], torch.rand(tokens, 2)
        matrices = torch.randn(4, 256, 64) / 8, torch.randn(4, 64, 128) / 8
        up, down = (value.bfloat16().requires_grad_() for value in matrices)
        ops.grouped_mlp(x.bfloat16().requires_grad_(), index, weight, up, down).sum().backward()
        small, scales = zip(*(ops.quantize_rows(value.flatten(0, 1)) for value in matrices), strict=True)
        up, down = (value.view_as(matrix) for value, matrix in zip(small, matrices, strict=True))
        up_scale, down_scale = (scale.view(4, -1) for scale in scales)
        ops.grouped_mlp(x.bfloat16(), index, weight, up, down, up_scale=up_scale, down_scale=down_scale)
    for vocab_size in (61, 5003):
        ops.sampling_edge(torch.rand(3, vocab_size), torch.tensor([1, 9, 40]), 0.9)


PARTS = {"decoder": decode, "serving": serve, "training": train, "scan": scan, "scan_roles": scan_roles, "route": route}


def main() -> None:
    torch.set_default_device(DEVICE)
    names = sys.argv[1:] or [*PARTS, *OPS]
    for name, part in PARTS.items():
        if name in names:
            part()
            torch.cuda.synchronize()
            print(name, flush=True)
    for case in CASES:
        for backend in OPS[case.name]:
            if backend in ("cuda", "triton") and case.name in names:
                count = sum(len(case.run(inputs, backend)) for inputs in inputs_of(case))
                torch.cuda.synchronize()
                print(case.name, backend, count, "tensors", flush=True)


if __name__ == "__main__":
    main()
