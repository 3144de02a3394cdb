"""What a task gives: tokens, and which of the next tokens are asked for."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from statespan.errors import UserError

NOT_ASKED = -100


@dataclass(frozen=True)
class TaskBatch:
    """Rows of a task in the form that `LanguageModel.forward(input_ids, labels=)` takes.

    `labels[:, t]` is asked of the model once it has read `input_ids[:, :t]`. It need not be the token that stands at t.
    """

    input_ids: Tensor  # [b t] int64
    labels: Tensor  # [b t] int64, NOT_ASKED where nothing is asked
    num_asked: int  # in each row

    def to(self, device: torch.device | str) -> "TaskBatch":
        """The same on another device."""
        return TaskBatch(self.input_ids.to(device), self.labels.to(device), self.num_asked)

    def asked(self) -> tuple[Tensor, Tensor]:
        """(places, answers), each [b num_asked] int64: having read up to and with a place, the model is to answer."""
        found = (self.labels != NOT_ASKED).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        places = found[:, : self.num_asked]
        return places - 1, self.labels.gather(1, places)


def generator(seed: int, device: torch.device | str) -> Generator:
    """Random numbers of a seed on a device; the same pair gives the same numbers."""
    return Generator(device).manual_seed(seed)


def require(condition: bool, task: str, message: str) -> None:
    """Raise UserError unless the sizes of a task can work."""
    if not condition:
        raise UserError(f"{task}: {message}")


def distinct(random: Generator, batch_size: int, count: int, below: int) -> Tensor:
    """[b count] different numbers of 0 .. below-1 in each row, in random order."""
    return torch.rand(batch_size, below, generator=random, device=random.device).topk(count, dim=1).indices
