"""Greedy tokens of the decoding kernels on trained weights, judged by a float32 forward of the same weights on the CPU.

    python -m benchmarks.gpu_greedy [--seconds 15] [--new 512] [--only bfloat16]

A byte model of Mamba-1 blocks is trained on the Python source of the installed torch for some seconds, so that its
tokens are nearly certain where a trained model's are. Then `statespan.generate` continues prompts of 64 held-out bytes,
and the layers' own forward on the CPU reads what came out: at each token, which would it have chosen, and by how much
is the chosen one's logit less? The weights are rounded or quantised first; the CPU takes them as they are then.
"""

import argparse
import copy
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import statespan
from benchmarks.record import Row, report
from statespan.models import decoder
from statespan.models.language_model import LanguageModel
from statespan.models.presets import preset

HIDDEN, LAYERS = 512, 8
BATCH, LENGTH, RATE = 16, 1024, 2e-3
PROMPT, HELD_OUT = 64, 200_000
ROWS = {"bfloat16": (1, 3, 9, 20, 64, 130), "int8": (1, 9, 20, 64), "float16": (1, 9, 64), "float32": (1, 9, 20)}
OWN_FORWARD = (1, 20, 64)  # rows of the comparison without the kernels


def source_text() -> Tensor:
    """Bytes [n] uint8."""
    files = sorted((Path(sysconfig.get_paths()["purelib"]) / "torch").rglob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def trained(text: Tensor, seconds: float) -> LanguageModel:
    """A byte model after so many seconds on one GPU, in float32."""
    config = preset("mamba-130m")
    config = config.replace(
        vocab_size=256, hidden_size=HIDDEN, layers=config.layers[:LAYERS], bos_token_id=None, eos_token_ids=()
    )
    model = statespan.build(config, device="cuda", seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text, places = text.cuda(), torch.arange(LENGTH, device="cuda")
    model.train()
    begin, steps, loss = time.perf_counter(), 0, torch.zeros(())
    while (progress := (time.perf_counter() - begin) / seconds) < 1:
        steps += 1
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, steps / 50) * (1 - 0.95 * progress)
        ids = text[torch.randint(len(text) - LENGTH, (BATCH, 1), device="cuda") + places].long()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if steps % 20 == 0:
            torch.cuda.synchronize()
    print(f"{steps} steps of {BATCH} x {LENGTH} bytes, {loss.item() / 0.6931:.2f} bits a byte")
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def judged(model: LanguageModel, exact: LanguageModel, text: Tensor, num_rows: int, new: int) -> tuple[int, float, str]:
    """Tokens that differ from the exact model's choice, the largest gap between the two's logits, and a note."""
    torch.manual_seed(num_rows)
    starts = torch.randint(len(text) - PROMPT, (num_rows,)).tolist()
    prompts: list[list[int]] = [text[start : start + PROMPT].tolist() for start in starts]
    found = statespan.generate(model, prompts, max_new_tokens=new, temperature=0, ignore_eos=True)
    chosen = torch.tensor([one.token_ids for one in found])
    ids = torch.cat([torch.tensor(prompts), chosen], dim=1)
    logits = exact(ids[:, :-1]).logits[:, PROMPT - 1 :].float()
    gaps = logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1)
    two = logits.topk(2, dim=-1).values
    near = two[..., 0] - two[..., 1]
    ties = f"the best two are within 0.01 at {int((near < 0.01).sum())}, within 0.1 at {int((near < 0.1).sum())}"
    return int((gaps > 0).sum()), gaps.max().item(), f"of {chosen.numel():,}; {ties}"


def rows(seconds: float, new: int, only: str) -> Iterator[Row]:
    """Of each dtype and number of rows."""
    text = source_text()
    model = trained(text[:-HELD_OUT], seconds)
    text = text[-HELD_OUT:]
    half = copy.deepcopy(model).to(torch.bfloat16)
    models = {
        "bfloat16": half,
        "int8": statespan.quantize(copy.deepcopy(half)),
        "float16": copy.deepcopy(model).to(torch.float16),
        "float32": model,
    }
    for dtype, one in models.items():
        if only not in dtype:
            continue
        exact = copy.deepcopy(one).float().cpu()
        for num_rows in ROWS[dtype]:
            differing, gap, note = judged(one, exact, text, num_rows, new)
            yield Row(
                f"{num_rows} rows, greedy, {new} tokens",
                f"kernels, {dtype}",
                differing,
                "tokens",
                0.0,
                f"{note}; largest gap {gap:.4f}",
            )
    if only in "bfloat16":
        exact = copy.deepcopy(half).float().cpu()
        with (
            mock.patch.object(decoder, "prepare", lambda *_: None),
            mock.patch.object(decoder, "prepare_stack", lambda *_: None),
        ):
            for num_rows in OWN_FORWARD:
                differing, gap, note = judged(copy.deepcopy(half), exact, text, num_rows, new)
                yield Row(
                    f"{num_rows} rows, greedy, {new} tokens",
                    "layers' own forward, bfloat16",
                    differing,
                    "tokens",
                    0.0,
                    f"{note}; largest gap {gap:.4f}",
                )


def main() -> None:
    """Train, judge and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of training")
    parser.add_argument("--new", type=int, default=512, help="tokens of each row")
    parser.add_argument("--only", default="", help="dtypes whose name holds this")
    asked = parser.parse_args()
    for row in rows(asked.seconds, asked.new, asked.only):
        report("gpu_greedy", [row], ["statespan", "torch", "triton", "cuda-core"])


if __name__ == "__main__":
    main()
