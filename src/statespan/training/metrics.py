"""Metrics of a run: rows of numbers to metrics.jsonl, one JSON object a line, and to TensorBoard."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from statespan.layers.routing import RouterMetrics

FILE_NAME = "metrics.jsonl"
Row = dict[str, Any]  # numbers and lists of numbers by name


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """nats / (ln 2 * bytes): the code length of text per byte of it, whatever its tokens are; 0 for no bytes."""
    return nats / math.log(2) / num_bytes if num_bytes else 0.0


@dataclass
class Totals:
    """Sums over the steps since the last row of metrics."""

    nats: float = 0.0  # summed cross entropy
    num_predicted: int = 0  # tokens predicted
    num_bytes: int = 0  # bytes of text predicted
    num_tokens: int = 0  # tokens processed
    seconds: float = 0.0
    aux_loss: float = 0.0
    num_steps: int = 0

    def row(self) -> Row:
        """loss in nats a token, bits per byte, the auxiliary loss a step, and speed."""
        return {
            "loss": self.nats / max(self.num_predicted, 1),
            "bits_per_byte": bits_per_byte(self.nats, self.num_bytes),
            "aux_loss": self.aux_loss / max(self.num_steps, 1),
            "tokens_per_s": self.num_tokens / self.seconds if self.seconds else 0.0,
        }


@torch.no_grad()
def router_row(router: Sequence[RouterMetrics], layers: Sequence[int]) -> Row:
    """What each router did with the last batch; `layers` are the indices of the mixture-of-experts layers."""
    row: Row = {}
    for layer, metrics in zip(layers, router, strict=True):
        row[f"layers.{layer}.expert_share"] = metrics.expert_share.tolist()
        row[f"layers.{layer}.load_balance_loss"] = metrics.load_balance_loss.item()
        row[f"layers.{layer}.router_z_loss"] = metrics.router_z_loss.item()
        row[f"layers.{layer}.dropped_fraction"] = metrics.dropped_fraction.item()
    return row


class MetricsWriter:
    """Appends rows to metrics.jsonl and to event files under tensorboard/ in the run directory.

    Args:
        directory: the run directory.
        last_step: the step that the run goes on from; rows that an interrupted run wrote after it are dropped.
    """

    def __init__(self, directory: Path, last_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / FILE_NAME
        kept = [row for row in read_metrics(directory) if row["step"] <= last_step] if self.path.exists() else []
        rewritten = self.path.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        rewritten.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(directory / "tensorboard", purge_step=last_step + 1)

    def write(self, row: Row) -> None:
        """Add one row; it has a `step`. A list becomes one TensorBoard curve an entry."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, list):
                for index, item in enumerate(value):
                    self._tensorboard.add_scalar(f"{name}/{index}", item, row["step"])
            elif name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(directory: str | Path) -> list[Row]:
    """The rows of a run directory's metrics.jsonl; an unfinished last line is left out.

    Args:
        directory: of a run.
    Returns:
        A dictionary a row, of what `MetricsWriter` writes, the oldest first.
    Raises:
        FileNotFoundError: there is no such file.
    """
    rows = list[Row]()
    for line in (Path(directory) / FILE_NAME).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
