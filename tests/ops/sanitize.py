"""Runs every GPU kernel at tiny shapes, for compute-sanitizer: `make sanitize`.

With names of ops, those only; "decoder" is the steps of a generated token. Each tensor is an allocation of its own, so
that memcheck sees what goes beyond one.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before PyTorch is imported

import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_bad_input import CASES, FINAL, LENGTH, NUMBERS, Case, Inputs, misaligned

from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.quantize import quantize
from statespan.ops.dispatch import OPS

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


@torch.inference_mode()
def decode(config: ModelConfig, batch_size: int, quantized: bool) -> int:
    """Some tokens through a model; how many logits there were."""
    model = build(config, device="cuda", dtype=torch.bfloat16).eval()
    model = quantize(model) if quantized else model
    ids = torch.randint(0, 61, (batch_size, 9))
    decoder = model.decoder(batch_size)
    decoder.start(model(ids[:, :5], state=model.new_state(batch_size)).state, room=4)
    return sum(decoder(token).numel() for token in ids[:, 5:].unbind(1))


def main() -> None:
    torch.set_default_device("cuda")
    if "decoder" in (sys.argv[1:] or ["decoder"]):
        print("decoder", sum(decode(*of) for of in DECODED), "logits", flush=True)
    for case in CASES:
        for backend in OPS[case.name]:
            if backend in ("cuda", "triton") and case.name in (sys.argv[1:] or OPS):
                count = sum(len(case.run(inputs, backend)) for inputs in inputs_of(case))
                torch.cuda.synchronize()
                print(case.name, backend, count, "tensors", flush=True)


if __name__ == "__main__":
    main()
