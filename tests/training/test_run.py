"""A whole run: what it leaves in its folder and returns, and how it ends when something is wrong."""

import errno
import json
import math
import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from statespan import checkpoints
from statespan.errors import DataError, NonFiniteLoss, UserError
from statespan.models.build import build
from statespan.training import EvaluationConfig, ProgressDisplay, TrainingConfig, evaluate, read_metrics, train
from statespan.training.data import load_data
from statespan.training.metrics import MetricsWriter, Row
from statespan.training.run import sample


def test_a_run_from_beginning_to_end(tmp_path: Path, config: TrainingConfig):
    out = StringIO()
    config = config.override(["evaluation.every_steps=3", "evaluation.max_bytes=300"])
    result = train(config, tmp_path / "a" / "run", display=ProgressDisplay(Console(file=out, width=200)))
    directory = tmp_path / "a" / "run"
    assert sorted(path.name for path in directory.iterdir()) == [
        *("checkpoints", "config.json", "metrics.jsonl", "tensorboard")
    ]
    assert TrainingConfig.load(directory) == config
    assert (result.step, result.num_tokens, result.interrupted_by) == (6, 6 * 4 * 16, None)
    assert result.checkpoint == directory / "checkpoints" / "step-000006"
    _, held_out = load_data(config.data, checkpoints.ByteTokenizer())
    assert held_out is not None and result.held_out is not None
    again = evaluate(checkpoints.load(result.checkpoint), held_out, config.evaluation)
    assert replace(again, seconds=0) == replace(result.held_out, seconds=0)  # from the disk, the very same figure
    rows = read_metrics(directory)
    assert [(row["step"], "loss" in row) for row in rows] == [
        *[(2, True), (3, False), (4, True), (6, True), (6, False)]
    ]
    assert rows[1]["held_out.num_bytes"] <= 300 < rows[4]["held_out.num_bytes"] == held_out.num_bytes
    assert rows[4]["held_out.bits_per_byte"] == result.held_out.bits_per_byte
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("10,528 parameters, 2 layers; ")
    assert any(line.startswith("training 100%  step 6  loss") and line.endswith("0:00 left") for line in lines)
    assert f"step 6: held-out text {result.held_out.bits_per_byte:.3f} bits/byte" in lines[-1]


def test_runs_with_the_same_config_are_equal_and_the_seed_matters(tmp_path: Path, config: TrainingConfig):
    def final(name: str, config: TrainingConfig) -> torch.Tensor:
        return checkpoints.load(train(config, tmp_path / name).checkpoint).embedding.weight

    first = final("one", config)
    torch.manual_seed(5)
    assert torch.equal(first, final("two", config))
    assert not torch.equal(first, final("three", config.override(["run.seed=1"])))


def test_subword_tokenizer_is_saved_and_counts_bytes(tmp_path: Path, config: TrainingConfig):
    words = {word: i for i, word in enumerate(["?", "the", "cat", "a", "dog", "sat", "on", "was", "it", ".", "naïve"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "?"}))
    config = config.override([f"data.tokenizer={tmp_path / 'tokenizer.json'}", "data.sequence_length=8"])
    result = train(config.override(["model.vocab_size=11"]), tmp_path / "run")
    model = checkpoints.load(result.checkpoint)
    assert model.tokenizer is not None and model.tokenizer.encode("the cat") == [1, 2]
    assert model.config.eos_token_ids == (0,)
    assert result.held_out is not None
    text_bytes = [path.stat().st_size for path in Path(str(config.data.train)).iterdir()]
    assert result.held_out.num_bytes in {a + b for a in text_bytes for b in text_bytes}
    row = read_metrics(tmp_path / "run")[0]
    assert 1 < row["loss"] / math.log(2) / row["bits_per_byte"] < 6  # bytes a token
    with pytest.raises(UserError, match=r"the tokenizer has 11 tokens and the model 10; set model.vocab_size=11"):
        train(config.override(["model.vocab_size=10"]), tmp_path / "other")


def test_nothing_held_out_gives_no_figure(tmp_path: Path, config: TrainingConfig):
    config = config.override(["data.held_out_fraction=0", "evaluation.every_steps=2"])
    assert train(config, tmp_path / "run").held_out is None


def test_sample_is_whole_documents_within_the_limit(config: TrainingConfig):
    _, held_out = load_data(replace(config.data, held_out_fraction=0.5), checkpoints.ByteTokenizer())
    assert held_out is not None
    documents = {held_out.document(i).tobytes() for i in range(len(held_out))}
    for limit in (1, 300, 1000, 10**6):
        chosen = sample(held_out, limit)
        found = {chosen.document(i).tobytes() for i in range(len(chosen))}
        assert len(found) == len(chosen) and found <= documents
        assert chosen.num_bytes <= limit or len(chosen) == 1
    assert len(chosen) == len(held_out)


def test_bad_loss_keeps_the_last_good_checkpoint(tmp_path: Path, config: TrainingConfig):
    broken = config.override(["run.save_every=1", "optimizer.learning_rate=1e30", "schedule.warmup_fraction=0"])
    with pytest.raises(NonFiniteLoss) as error:
        train(broken, tmp_path / "run")
    message = str(error.value)
    assert "is not finite; first seen in the " in message
    assert message.endswith(f"Last good checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-000001'}")
    model = checkpoints.load(tmp_path / "run" / "checkpoints" / "step-000001")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bad_data_leaves_no_folder(tmp_path: Path, config: TrainingConfig):
    for data, message in (
        (replace(config.data, train=str(tmp_path / "nowhere")), "no such file or folder"),
        (replace(config.data, held_out=str(tmp_path / "nowhere")), "no such file or folder"),
        (replace(config.data, sequence_length=10**6), "less than one row"),
    ):
        with pytest.raises(DataError, match=message):
            train(replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*run: .*Not a directory"):
        train(config, tmp_path / "file" / "run")

    def full(writer: MetricsWriter, row: Row) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left on device; checkpoints"):
        patch.setattr(MetricsWriter, "write", full)
        train(config.override(["run.save_every=1"]), tmp_path / "run")
    assert train(config, tmp_path / "run", resume=True).step == 6


def test_training_beats_no_training(tmp_path: Path, config: TrainingConfig):
    config = config.override(["run.max_steps=60", "run.batch_size=8", "optimizer.learning_rate=0.01"])
    result = train(config, tmp_path / "run")
    _, held_out = load_data(config.data, checkpoints.ByteTokenizer())
    assert held_out is not None and result.held_out is not None
    assert result.held_out.bits_per_byte < 0.5 * evaluate(build(config.model), held_out).bits_per_byte
    pieces = evaluate(checkpoints.load(result.checkpoint), held_out, EvaluationConfig(context_length=8))
    assert result.held_out.bits_per_byte < pieces.bits_per_byte  # longer context helps
