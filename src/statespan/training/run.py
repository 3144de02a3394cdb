"""One training run from a config: data, model, optimizer, loop, checkpoints, and the held-out figure at the end."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statespan import checkpoints
from statespan.dataclass_io import to_plain
from statespan.errors import NonFiniteLoss, UserError
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import Tokenizer
from statespan.training.allocator import keep_freed_memory
from statespan.training.config import TrainingConfig
from statespan.training.data import Corpus, load_data, load_tokenizer
from statespan.training.evaluation import EvaluationResult, evaluate
from statespan.training.interruption import Interruption
from statespan.training.metrics import MetricsWriter, Row
from statespan.training.optimizer import build_optimizer
from statespan.training.packing import PackedRows
from statespan.training.progress import ProgressDisplay, duration
from statespan.training.resume import RunState, list_checkpoints, restore, save_checkpoint
from statespan.training.trainer import PRECISIONS, Trainer


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to."""

    run_directory: Path
    checkpoint: Path  # the newest; `statespan.load` reads it
    step: int  # updates made
    seconds: float  # of training steps
    num_tokens: int  # tokens processed
    held_out: EvaluationResult | None  # None: nothing held out, or interrupted
    interrupted_by: str | None = None  # "SIGINT" or "SIGTERM"; None: the run is over


class _Interrupted(Exception):  # it is a request, no error
    """An evaluation was interrupted."""


def train(
    config: TrainingConfig,
    run_directory: str | Path,
    *,
    resume: bool = False,
    display: ProgressDisplay | None = None,
) -> TrainingResult:
    """Train as `config` says and keep everything in `run_directory`.

    The folder gets config.json, metrics.jsonl, tensorboard/ and checkpoints/step-N/. Ctrl-C and SIGTERM save a
    checkpoint first. On the CPU a run that was stopped and resumed equals an uninterrupted one bit for bit, as long as
    the schedule follows steps.

    Args:
        config: the whole run.
        run_directory: made where it does not exist.
        resume: go on from the newest checkpoint there, with the same model and data.
        display: where progress is shown; None: on standard error.
    Raises:
        UserError: the config, the data or the folder cannot be used.
        NonFiniteLoss: the loss or gradient is not finite; the message names step and layer.
        CheckpointError: a checkpoint cannot be written, such as on a full disk; the one before is intact.

    Example:
        >>> result = train(load_recipe("mambabyte_tiny_cpu"), "runs/first")  # doctest: +SKIP
        >>> model = statespan.load(result.checkpoint)  # doctest: +SKIP
    """
    config.check()
    directory = Path(run_directory)
    last = _last_checkpoint(directory, config, resume)
    torch.manual_seed(config.run.seed)
    tokenizer = load_tokenizer(config.data.tokenizer)
    corpus, held_out = load_data(config.data, tokenizer)
    trainer = _trainer(config, corpus, tokenizer, last)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        config.save(directory)
        with (
            Interruption() as interruption,
            MetricsWriter(directory, trainer.state.step) as metrics,
            display or ProgressDisplay() as display,
        ):
            run = _Run(config, directory, trainer, metrics, display, interruption, held_out)
            display.say(run.describe(corpus))
            return run.to_the_end()
    except OSError as error:  # metrics on a full disk, a folder that may not be written
        raise UserError(f"cannot write {directory}: {error}; checkpoints saved there are intact") from None


@dataclass
class _Run:
    """A run under way: what the loop calls back to."""

    config: TrainingConfig
    directory: Path
    trainer: Trainer
    metrics: MetricsWriter
    display: ProgressDisplay
    interruption: Interruption
    held_out: Corpus | None

    def describe(self, corpus: Corpus) -> str:
        model = self.trainer.model
        parameters = sum(p.numel() for p in model.parameters())
        held = f", {self.held_out.num_bytes:,} bytes held out" if self.held_out is not None else ""
        return (
            f"{parameters:,} parameters, {len(model.config.layers)} layers; {corpus.num_bytes:,} bytes of text in "
            f"{len(corpus):,} documents{held}; from step {self.trainer.state.step} in {self.directory}"
        )

    def to_the_end(self) -> TrainingResult:
        """Train, save, evaluate."""
        try:
            self.trainer.run(
                on_metrics=self.log,
                on_evaluation=self.evaluate_sample,
                on_checkpoint=self.save,
                should_stop=lambda: self.interruption.signal is not None,
            )
            checkpoint = self.save()
            held_out = self.evaluate(self.held_out) if self.interruption.signal is None else None
        except NonFiniteLoss as error:
            saved = list_checkpoints(self.directory)
            raise NonFiniteLoss(f"{error}. Last good checkpoint: {saved[-1] if saved else 'none'}") from None
        stopped = self.interruption.signal
        if stopped is not None:
            self.display.say(
                f"stopped by {stopped.name} at step {self.trainer.state.step}: saved {checkpoint}, resume to go on"
            )
        state = self.trainer.state
        return TrainingResult(
            self.directory,
            checkpoint,
            state.step,
            state.seconds,
            state.num_tokens,
            held_out,
            interrupted_by=None if stopped is None else stopped.name,
        )

    def save(self) -> Path:
        trainer = self.trainer
        return save_checkpoint(
            self.directory, trainer.model, trainer.optimizer, trainer.state, self.config.run.keep_checkpoints
        )

    def log(self, row: Row) -> None:
        self.metrics.write(row)
        share, seconds = self.trainer.progress, self.trainer.state.seconds
        self.display.show(
            "training",
            share,
            f"step {row['step']}  loss {row['loss']:.3f}  {row['bits_per_byte']:.3f} bits/byte  "
            f"{row['tokens_per_s']:,.0f} tokens/s  {duration(max(seconds / share - seconds, 0))} left",
        )

    def evaluate_sample(self) -> None:
        """The held-out figure on a fixed sample of documents, as `evaluation.max_bytes` allows."""
        limit = self.config.evaluation.max_bytes
        self.evaluate(self.held_out if self.held_out is None or limit is None else sample(self.held_out, limit))

    def evaluate(self, corpus: Corpus | None) -> EvaluationResult | None:
        """Evaluate and record; None without text or when interrupted."""
        if corpus is None:
            return None
        try:
            precision = PRECISIONS[self.config.run.precision]
            result = evaluate(
                self.trainer.model, corpus, self.config.evaluation, precision=precision, on_progress=self._evaluating
            )
        except _Interrupted:
            return None
        self.metrics.write({"step": self.trainer.state.step} | {f"held_out.{k}": v for k, v in asdict(result).items()})
        self.display.say(
            f"step {self.trainer.state.step}: held-out text {result.bits_per_byte:.3f} bits/byte "
            f"({result.num_bytes:,} bytes in {duration(result.seconds)})"
        )
        return result

    def _evaluating(self, share: float) -> None:
        self.display.show("evaluating", share)
        if self.interruption.signal is not None:
            raise _Interrupted


def sample(corpus: Corpus, max_bytes: int) -> Corpus:
    """Documents drawn with a fixed seed, whole, as many as fit in `max_bytes`; at least one."""
    order = np.random.default_rng(0).permutation(len(corpus))
    sizes = np.array([corpus.count_bytes(int(i)) for i in order])
    return corpus.select(order[: max(1, int(np.searchsorted(np.cumsum(sizes), max_bytes, side="right")))])


def _trainer(config: TrainingConfig, corpus: Corpus, tokenizer: Tokenizer, last: Path | None) -> Trainer:
    """The trainer at its first step, or as it was at the checkpoint `last`."""
    device = torch.device(config.run.device)
    if device.type == "cpu":
        keep_freed_memory()
    if last is None:
        model = build(_with_tokenizer(config.model, tokenizer), seed=config.run.seed, device=device)
        model.tokenizer = tokenizer
    else:
        model = checkpoints.load(last, device=device)
    optimizer = build_optimizer(model, config.optimizer)
    fingerprint = corpus.fingerprint()
    state = RunState(data=fingerprint) if last is None else restore(last, model, optimizer)
    if state.data != fingerprint:
        raise UserError(f"cannot resume {last}: the training text is not the same as when it was saved")
    rows = PackedRows(corpus, config.data.sequence_length, config.data.seed)
    return Trainer(config, model, optimizer, rows, state)


def _with_tokenizer(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's config with the tokenizer's ids, where it has none of its own."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return replace(
        model,
        bos_token_id=tokenizer.bos_id if model.bos_token_id is None else model.bos_token_id,
        eos_token_ids=model.eos_token_ids or tokenizer.eos_ids,
    )


def _last_checkpoint(directory: Path, config: TrainingConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from; UserError where the folder and `resume` do not fit each other."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a folder for the run")
    found = list_checkpoints(directory)
    if not resume:
        if found:
            raise UserError(
                f"{directory} holds a run up to {found[-1].name}; resume it with --resume, or give another folder"
            )
        return None
    if not found:
        raise UserError(f"{directory} has no checkpoint to resume from")
    before = TrainingConfig.load(directory)
    for section in ("model", "data"):
        difference = first_difference(to_plain(getattr(before, section)), to_plain(getattr(config, section)), section)
        if difference:
            raise UserError(f"cannot resume {directory}: {difference}; a run keeps its model and data")
    return found[-1]


def first_difference(before: Any, now: Any, name: str) -> str | None:
    """The first field of two JSON values that differs, in words."""
    if isinstance(before, dict):
        differences = (first_difference(before[key], now[key], f"{name}.{key}") for key in before)
        return next(filter(None, differences), None)
    return None if before == now else f"{name} was {before} and is now {now}"
