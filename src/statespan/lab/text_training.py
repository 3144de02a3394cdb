"""Train a language model on text, and read its held-out figure: what the experiments on language share."""

import math
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.lab.experiment import Changes, Progress, Row, Setting, settings_by_change
from statespan.lab.task_training import TaskPlan, train_in_looks
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.training import DataConfig, EvaluationConfig, evaluate
from statespan.training.data import Corpus, load_data, load_tokenizer
from statespan.training.documents import python_sources
from statespan.training.run import sample
from statespan.training.trainer import PRECISIONS

LIBRARY, PACKAGES = "python", "packages"  # a setting's `text`: Python sources of the standard library, or installed
ON_GPU: Changes = {"device": "cuda", "seeds": 3, "text": PACKAGES, "max_files": 8000}
ON_CPU: Changes = {
    "time": "60 s of 2 cores",
    "device": "cpu",
    "seeds": 1,
    "text": LIBRARY,
    "max_files": None,
    "precision": "float32",
    "sequence_length": 256,
    "batch_size": 8,
    "held_out_bytes": 65_536,
    "log_every": 25,
}
TINY: Changes = {
    "time": "seconds",
    "hidden_size": 16,
    "sequence_length": 32,
    "batch_size": 2,
    "steps": 3,
    "held_out_bytes": 2000,
    "log_every": 1,
}
# Units that run side by side wait for one of them to read the text, or to find the subwords.
_reading, _finding = threading.Lock(), threading.Lock()


@dataclass(frozen=True, kw_only=True)
class TextSetting(Setting):
    """Text and training that the experiments on language share."""

    text: str = LIBRARY  # or "packages", or a file or folder
    max_files: int | None = None  # of the packages, drawn at random; None: all
    sequence_length: int = 512
    batch_size: int = 16
    steps: int = 2000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    precision: str = "bfloat16"
    held_out_bytes: int = 1_048_576  # of the held-out documents
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if min(self.batch_size, self.log_every) < 1:
            raise UserError("batch_size and log_every must be at least 1")
        if self.max_files is not None and self.max_files < 2:
            raise UserError(f"max_files must be at least 2, one of them held out, got {self.max_files}")
        self.plan()

    def plan(self) -> TaskPlan:
        """Steps and learning rates."""
        return TaskPlan(
            self.steps,
            self.learning_rate,
            warmup_fraction=0.05,
            final_ratio=0.05,
            weight_decay=self.weight_decay,
            clip_norm=1.0,
            precision=PRECISIONS[self.precision],
            look_every=self.log_every,
        )

    def evaluation(self) -> EvaluationConfig:
        """As far back as in training, for all alike: rotary positions beyond are untrained."""
        length = self.sequence_length
        return EvaluationConfig(context_length=length, batch_size=64, chunk_length=length)


T = TypeVar("T", bound=TextSetting)


def text_settings(kind: type[T], h100: Changes, cpu: Changes, tiny: Changes) -> dict[str, T]:
    """An experiment's settings by what each changes of those that the experiments on text share."""
    return settings_by_change(kind, ON_GPU | h100, ON_CPU | cpu, TINY | tiny)


def corpora(setting: TextSetting, tokenizer: str = "bytes") -> tuple[Corpus, Corpus]:
    """Training and held-out text, a file a document, read once a process; the same files for all seeds."""
    with _reading:
        return _read(setting.text, setting.max_files, tokenizer)


@lru_cache(maxsize=4)
def _read(text: str, max_files: int | None, tokenizer: str) -> tuple[Corpus, Corpus]:
    files: str | tuple[str, ...] = text
    if text in (LIBRARY, PACKAGES):
        root = Path(sysconfig.get_path("stdlib" if text == LIBRARY else "purelib"))
        files = tuple(str(root / file) for file in python_sources(root, max_files))
    config = DataConfig(train=files, held_out_fraction=0.05, sequence_length=2, tokenizer=tokenizer)
    train, held_out = load_data(config, load_tokenizer(tokenizer))
    assert held_out is not None  # a share is held out
    return train, held_out


@dataclass(frozen=True, kw_only=True)
class SubwordSetting(TextSetting):
    """Text as subwords, found in a part of it by byte-pair encoding."""

    vocab_size: int = 4096
    tokenizer_bytes: int = 4_000_000  # of training text that the subwords are found in

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < 257:
            raise UserError(f"vocab_size must be above 256, the bytes, got {self.vocab_size}")


def subwords(setting: SubwordSetting) -> str:
    """The tokenizer.json of the setting's subwords, found once a process."""
    with _finding:
        return _find(setting)[0]


@lru_cache(maxsize=1)
def _find(setting: SubwordSetting) -> tuple[str, tempfile.TemporaryDirectory[str]]:
    """It lies in a folder that lasts as long as this is kept."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    train, _ = corpora(setting)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=setting.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = sample(train, setting.tokenizer_bytes)
    tokenizer.train_from_iterator(
        (documents.document(i).tobytes().decode(errors="ignore") for i in range(len(documents))), trainer
    )
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path), folder


class TextRows:
    """Rows for training: stretches of one document each, in an order that follows from the seed, epoch after epoch.

    A document's last row ends with it; documents shorter than a row are left out. So no row holds two documents, and
    attention needs no mask.

    Args:
        corpus: the documents.
        setting: sizes and number of the batches.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus, setting: TextSetting, seed: int) -> None:
        length, total = setting.sequence_length, setting.steps * setting.batch_size
        pairs = zip(corpus.starts.tolist(), corpus.lengths.tolist(), strict=True)
        starts = [first + np.minimum(np.arange(0, n, length), n - length) for first, n in pairs if n >= length]
        if not starts:
            raise UserError(f"no document of the text has {length} tokens, a row's length; lower sequence_length")
        rows, random = np.concatenate(starts), np.random.default_rng(seed)
        order = np.concatenate([random.permutation(rows) for _ in range(-(-total // len(rows)))])[:total]
        wide = corpus.tokens.astype(np.uint8 if corpus.tokens.itemsize == 1 else np.int32)
        self._tokens = torch.from_numpy(wide).to(setting.device)
        self._starts = torch.from_numpy(order.reshape(setting.steps, setting.batch_size)).to(setting.device)
        self._span = torch.arange(length, device=setting.device)

    def __call__(self, step: int, count: int) -> Tensor:
        """[count b t] int64: the batches of `count` steps from `step` on."""
        return self._tokens[self._starts[step : step + count].unsqueeze(-1) + self._span].long()


def train_on_text(
    setting: TextSetting,
    model_config: ModelConfig,
    seed: int,
    progress: Progress,
    *,
    adapt: Callable[[LanguageModel], None] = lambda model: None,
    tokenizer: str = "bytes",
) -> tuple[LanguageModel, list[Row]]:
    """The trained model, and the rows of its training: the loss along the way, then the held-out figure.

    Args:
        setting: text, steps, rates.
        model_config: what is trained.
        seed: of the weights and the order of the text.
        progress: called along the way.
        adapt: changes the fresh model in place before it is trained.
        tokenizer: "bytes" or a tokenizer.json.
    """
    train, held_out = corpora(setting, tokenizer)
    model = build(model_config, seed=seed, device=setting.device)
    adapt(model)
    bits_of_loss = train.num_tokens / train.num_bytes / math.log(2)
    curve: list[Row] = []
    started = time.perf_counter()

    def look(step: int, loss: float) -> bool:
        curve.append({"step": step, "bits_per_byte": loss * bits_of_loss})
        progress(step / setting.steps, f"step {step}  {loss * bits_of_loss:.3f} bits/byte")
        return False

    rows, plan = TextRows(train, setting, seed), setting.plan()
    loss = text_loss(model, plan.precision)
    train_in_looks(model, loss, lambda step, count: (rows(step, count),), plan, lambda share, words: None, look)
    seconds = time.perf_counter() - started
    part = sample(held_out, setting.held_out_bytes)
    final: Row = {
        "held_out": evaluate(model, part, setting.evaluation(), precision=plan.precision).bits_per_byte,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
    }
    return model, [*curve, final]


def text_loss(model: LanguageModel, precision: torch.dtype) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """(input_ids [b t]) -> what is trained, with the routers' losses; and the mean loss of the next token."""

    def loss(input_ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
            output = model(input_ids, labels=input_ids)
        assert output.loss is not None  # labels were given
        return output.loss + output.aux_loss, output.loss

    return loss
