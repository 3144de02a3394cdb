"""Train a language model on text with the product's trainer, and read its held-out figure."""

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from statespan.errors import UserError
from statespan.lab.experiment import Progress, Row, Setting
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.training import (
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    evaluate,
)
from statespan.training.data import Corpus, load_data, load_tokenizer
from statespan.training.optimizer import build_optimizer
from statespan.training.packing import PackedRows
from statespan.training.run import sample
from statespan.training.trainer import PRECISIONS, Trainer

LIBRARY = "python"  # a setting's `text`: Python's standard library, which every machine has
# Tests are repetitive, and hold files that are no UTF-8; site-packages are others' code, and differ between machines.
EXCLUDED = ("site-packages/*", "test/*", "*/test/*", "*/tests/*", "lib2to3/*", "config-*", "*.txt", "*.html", "*.css")


@dataclass(frozen=True, kw_only=True)
class TextSetting(Setting):
    """Text and training that the experiments on language share."""

    text: str = LIBRARY  # or a file or folder
    sequence_length: int = 512
    batch_size: int = 32
    steps: int = 3000
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    precision: str = "bfloat16"
    held_out_bytes: int = 524_288  # of the held-out documents
    log_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise UserError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        self.training_config(ModelConfig(), 0)

    def training_config(self, model: ModelConfig, seed: int, tokenizer: str = "bytes") -> TrainingConfig:
        """The run of one model; the split of the text is the same for all seeds, the order is not."""
        in_time = any(spec.mixer in ("s4", "s4d", "lssl", "lstm", "gru") for spec in model.layers)
        return TrainingConfig(
            model=model,
            data=DataConfig(
                train=sysconfig.get_paths()["stdlib"] if self.text == LIBRARY else self.text,
                exclude=EXCLUDED if self.text == LIBRARY else (),
                held_out_fraction=0.05,
                max_document_bytes=65_536,
                sequence_length=self.sequence_length,
                tokenizer=tokenizer,
            ),
            optimizer=OptimizerConfig(self.learning_rate, self.weight_decay),
            schedule=ScheduleConfig("cosine", warmup_fraction=0.05, final_ratio=0.05),
            # As far back as in training, for all alike: rotary positions beyond are untrained.
            evaluation=EvaluationConfig(
                context_length=self.sequence_length, batch_size=64, chunk_length=self.sequence_length
            ),
            run=RunConfig(
                seed=seed,
                max_steps=self.steps,
                batch_size=self.batch_size,
                precision="bfloat16" if self.precision == "bfloat16" else "float32",
                device=self.device,
                cuda_graph=self.device.startswith("cuda") and not in_time,
                log_every=min(self.log_every, self.steps),
            ),
        )


@lru_cache(maxsize=4)
def corpora(data: DataConfig) -> tuple[Corpus, Corpus]:
    """Training and held-out text, read once a process."""
    train, held_out = load_data(data, load_tokenizer(data.tokenizer))
    assert held_out is not None  # a share is held out
    return train, held_out


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
    config = setting.training_config(model_config, seed, tokenizer)
    config.check()
    train, held_out = corpora(config.data)
    model = build(model_config, seed=seed, device=setting.device)
    adapt(model)
    rows = PackedRows(train, setting.sequence_length, seed)
    trainer = Trainer(config, model, build_optimizer(model, config.optimizer), rows)
    curve: list[Row] = []

    def log(row: Row) -> None:
        curve.append({"step": row["step"], "bits_per_byte": row["bits_per_byte"]})
        progress(row["step"] / setting.steps, f"step {row['step']}  {row['bits_per_byte']:.3f} bits/byte")

    trainer.run(on_metrics=log, on_evaluation=lambda: None, on_checkpoint=lambda: None, should_stop=lambda: False)
    result = evaluate(
        model, sample(held_out, setting.held_out_bytes), config.evaluation, precision=PRECISIONS[setting.precision]
    )
    final: Row = {
        "held_out": result.bits_per_byte,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": trainer.state.seconds,
    }
    return model, [*curve, final]
