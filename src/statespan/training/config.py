"""TrainingConfig: everything that decides a training run, frozen, checked, JSON in and out, changed by `key=value`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from statespan.dataclass_io import apply_overrides, from_plain, to_plain
from statespan.errors import UserError
from statespan.models.config import ModelConfig

FILE_NAME = "config.json"


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes rows of tokens."""

    train: str | tuple[str, ...] = ()  # files and folders: text and source code, .jsonl, .parquet
    held_out: str | tuple[str, ...] = ()  # files and folders to evaluate on; empty: documents of `train` are held out
    held_out_fraction: float = 0.05  # share of the documents of `train`, or of a single one its end; 0: none
    exclude: tuple[str, ...] = ()  # patterns of paths inside the folders to leave out, such as "tests/*"
    text_field: str = "text"  # field of a jsonl or parquet row that holds the document
    max_document_bytes: int | None = None  # longer documents are cut at line ends into documents; None: never
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
    sequence_length: int = 512  # tokens a row
    seed: int = 0  # of the split and of the order

    def __post_init__(self) -> None:
        require(self.sequence_length >= 2, f"data.sequence_length must be at least 2, got {self.sequence_length}")
        require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction must be at least 0 and below 1, got {self.held_out_fraction}",
        )
        require(
            self.max_document_bytes is None or self.max_document_bytes >= 1,
            f"data.max_document_bytes must be at least 1, got {self.max_document_bytes}",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and gradient clipping."""

    learning_rate: float = 1e-3  # peak; the schedule multiplies it
    weight_decay: float = 0.1  # of matrices; A_log, D, dt biases, norms, biases and the embedding have none
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0  # largest global norm of the gradient; None: no clipping
    lti_learning_rate: float | None = None  # peak for A, B and dt of S4, S4D and LSSL layers; None: learning_rate

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate must be above 0, got {self.learning_rate}")
        lti = self.lti_learning_rate
        require(lti is None or lti > 0, f"optimizer.lti_learning_rate must be above 0, got {lti}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas must be in [0, 1), got {list(self.betas)}")
        require(
            self.clip_norm is None or self.clip_norm > 0, f"optimizer.clip_norm must be above 0, got {self.clip_norm}"
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run, in shares of the run's steps or seconds (see training/schedule.py)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: float = 0.02  # linear from 0 to the peak
    decay_fraction: float = 0.2  # wsd: share of the run that decays linearly at its end
    final_ratio: float = 0.1  # cosine, wsd: last learning rate / peak

    def __post_init__(self) -> None:
        for name in ("warmup_fraction", "decay_fraction", "final_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"schedule.{name} must be 0 to 1, got {value}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Bits per byte of the held-out text, while training and at its end."""

    every_steps: int | None = None  # None: at the end only
    max_bytes: int | None = 262_144  # text evaluated while training, whole documents; None: all, as at the end
    context_length: int | None = None  # tokens after which the state starts afresh; None: documents whole
    batch_size: int = 16  # documents side by side
    chunk_length: int = 512  # tokens a forward; the state is carried from chunk to chunk

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_length"):
            require(getattr(self, name) >= 1, f"evaluation.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("every_steps", "max_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluation.{name} must be at least 1, got {value}")
        length = self.context_length
        require(length is None or length >= 2, f"evaluation.context_length must be at least 2, got {length}")


@dataclass(frozen=True)
class RunConfig:
    """How long, how many rows at once, in which arithmetic, and what is kept."""

    seed: int = 0  # of the initial weights
    max_steps: int | None = 1000  # optimizer steps; None: until max_seconds
    max_seconds: float | None = None  # of training steps, without evaluation and saving; None: until max_steps
    batch_size: int = 16  # rows an optimizer step
    accumulation_steps: int = 1  # parts in which the batch goes through the model
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; the parameters stay float32
    activation_checkpointing: bool = False  # recompute each block in the backward: less memory, about 1/3 more time
    # Shares of the Mamba layers that compute something again in a GPU's backward instead of keeping it:
    recompute_projections: float = 0.0  # what in_proj gave: 1 costs 1/10 of the time
    recompute_convolutions: float = 1.0  # what the conv gave: 0 holds 2 b t d bytes more a layer and saves 1 or 2%
    recompute_casts: float = 1.0  # the weights in bfloat16: 0 holds 2 bytes more a weight and saves up to 1%
    device: str = "cpu"
    cuda_graph: bool = False  # capture forward and backward once and replay them: faster where layers are short
    log_every: int = 10  # steps a row of metrics
    save_every: int | None = None  # steps between checkpoints; None: at the end only
    keep_checkpoints: int = 2  # newest ones kept

    def __post_init__(self) -> None:
        for name in ("max_steps", "save_every", "batch_size", "accumulation_steps", "log_every", "keep_checkpoints"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name} must be at least 1, got {value}")
        require(
            self.max_seconds is None or self.max_seconds > 0, f"run.max_seconds must be above 0, got {self.max_seconds}"
        )
        for name in ("recompute_projections", "recompute_convolutions", "recompute_casts"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"run.{name} must be 0 to 1, got {share}")


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run. A recipe is a function that returns one.

    Example:
        >>> config = TrainingConfig(data=DataConfig(train="book.txt"))
        >>> config.override(["run.max_steps=50", "model.hidden_size=128"]).run.max_steps
        50
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    def check(self) -> None:
        """Raise UserError where fields disagree. Not part of construction, so that overrides may come in any order."""
        run, schedule = self.run, self.schedule
        require(run.max_steps is not None or run.max_seconds is not None, "set run.max_steps or run.max_seconds")
        require(
            run.batch_size % run.accumulation_steps == 0,
            f"run.accumulation_steps {run.accumulation_steps} must divide run.batch_size {run.batch_size}",
        )
        require(
            schedule.kind != "wsd" or schedule.warmup_fraction + schedule.decay_fraction <= 1,
            "schedule.warmup_fraction + schedule.decay_fraction must be at most 1",
        )
        on_host = sorted({spec.mixer for spec in self.model.layers if spec.mixer in ("s4", "s4d", "lssl")})
        require(
            not (run.cuda_graph and on_host),
            f"run.cuda_graph cannot capture {', '.join(on_host)} layers, which read the lengths of packed documents on "
            "the host; set run.cuda_graph=false",
        )
        require(bool(self.data.train), "data.train is empty; name a file or folder of text: data.train=book.txt")

    def override(self, assignments: Iterable[str]) -> "TrainingConfig":
        """A copy with `key=value` assignments applied, dots for nesting; unknown keys raise with the nearest known."""
        return apply_overrides(self, assignments)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back to an equal config."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingConfig":
        """Read JSON values; an unknown key raises UnknownName with the nearest known one."""
        return from_plain(cls, values)

    def save(self, directory: Path) -> None:
        """Write config.json into `directory`."""
        (directory / FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "TrainingConfig":
        """Read the config.json of a run directory."""
        path = Path(directory) / FILE_NAME
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{directory} is no run directory: it has no {FILE_NAME}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
