"""Which arithmetic trains faster on a device: float32, or bfloat16 under autocast."""

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

from statespan.models.build import build
from statespan.models.language_model import LanguageModel
from statespan.training.config import TrainingConfig

Precision = Literal["float32", "bfloat16"]
ROUNDS = 3


@dataclass(frozen=True)
class PrecisionChoice:
    """What was chosen, and the median seconds of one training step in each arithmetic."""

    name: Precision
    float32_s: float
    bfloat16_s: float

    def __str__(self) -> str:
        times = f"{self.float32_s:.2f} s in float32, {self.bfloat16_s:.2f} s in bfloat16 autocast"
        return f"{self.name} (a step took {times})"


def faster_precision(config: TrainingConfig) -> PrecisionChoice:
    """Time training steps of the config's model on its device, both in turn; the first round only warms up."""
    model = build(config.model, seed=0, device=config.run.device)
    model.train()
    shape = config.run.batch_size, config.data.sequence_length
    ids = torch.randint(config.model.vocab_size, shape, device=model.device)
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(1 + ROUNDS):
        for dtype, seconds in times.items():
            seconds.append(_step_seconds(model, ids, dtype))
    float32_s, bfloat16_s = (statistics.median(seconds[1:]) for seconds in times.values())
    return PrecisionChoice("bfloat16" if bfloat16_s < float32_s else "float32", float32_s, bfloat16_s)


def _step_seconds(model: LanguageModel, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds of a forward and backward."""
    started = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(ids, labels=ids)
    assert output.loss is not None  # labels were given
    (loss := output.loss + output.aux_loss).backward()
    loss.item()  # waits for a GPU
    model.zero_grad()
    return time.perf_counter() - started
