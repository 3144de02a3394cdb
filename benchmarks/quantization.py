"""What weight-only quantisation does to a small trained hybrid: bytes, logit KL against bfloat16, bits per byte.

    statespan demo                          # makes demo-output
    python -m benchmarks.quantization

KL is the mean over tokens of KL(p_bfloat16 || p_quantised) in nats, on held-out source of the demo that no model saw;
"same best" is the share of tokens whose likeliest token stays.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import statespan
from benchmarks.record import Row, report
from statespan.models.language_model import LanguageModel
from statespan.models.quantize import MODES, Quantization, quantize, weight_bytes

LENGTH, ROWS = 512, 16


def held_out(demo: Path) -> Tensor:
    """[rows length] bytes of held-out files."""
    text = b"".join(path.read_bytes() for path in sorted((demo / "corpus" / "held-out").rglob("*.py")))
    return torch.tensor(list(text[: ROWS * LENGTH])).view(-1, LENGTH)


@torch.inference_mode()
def log_probabilities(model: LanguageModel, ids: Tensor) -> Tensor:
    """[rows length v] float32 of the next token."""
    return torch.cat([model(rows).logits.float().log_softmax(-1) for rows in ids.split(8)])


def bits_per_byte(logprobs: Tensor, ids: Tensor) -> float:
    """Of bytes after the first of each row."""
    loss = F.nll_loss(logprobs[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return float(loss) / torch.tensor(2.0).log().item()


def rows_of(checkpoint: Path, ids: Tensor) -> list[Row]:
    """One system after the other, all against bfloat16."""
    reference = log_probabilities(statespan.load(checkpoint, dtype=torch.bfloat16), ids)
    rows: list[Row] = []
    systems: list[tuple[str, torch.dtype, Quantization | None]] = [
        ("float32", torch.float32, None),
        ("bfloat16", torch.bfloat16, None),
        *((mode, torch.bfloat16, mode) for mode in MODES),
    ]
    for system, dtype, mode in systems:
        model = statespan.load(checkpoint, dtype=dtype)
        model = model if mode is None else quantize(model, mode)
        found = log_probabilities(model, ids)
        kl = (reference.exp() * (reference - found)).sum(-1).mean()
        same = (reference.argmax(-1) == found.argmax(-1)).float().mean()
        size = weight_bytes(model.config, mode, dtype)
        rows += [
            Row("demo model, weights", system, size / 2**20, "MiB", 0.0),
            Row("demo model, KL against bfloat16", system, float(kl), "nats", 0.0, f"same best {float(same):.2%}"),
            Row("demo model, held-out", system, bits_per_byte(found, ids), "bits/byte", 0.0),
        ]
    return rows


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-output"), help="folder of the demo")
    demo: Path = parser.parse_args().demo
    report("quantization", rows_of(demo / "checkpoint", held_out(demo)), ["statespan", "torch", "torchao", "numba"])


if __name__ == "__main__":
    main()
