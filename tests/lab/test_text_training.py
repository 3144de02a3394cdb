"""Training on text: which rows it reads, what loss it tells, and what the report makes of the curves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from statespan.errors import UserError
from statespan.lab import text_training
from statespan.lab.text_results import HeldOut
from statespan.lab.text_training import TextRows, TextSetting, corpora, text_loss
from statespan.layers.config import MoEConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.training.data import ByteTokenizer, build_corpus
from statespan.training.trainer import PRECISIONS

SETTING = TextSetting(time="", variants=("x",), sequence_length=4, batch_size=3, steps=4, precision="float32")
TEXTS = ["abcdefghij", "xyz", "0123", "KLMNOPQR"]  # the second is shorter than a row


def words(rows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row)) for row in rows.flatten(0, 1).tolist()]


def test_rows_are_stretches_of_one_document() -> None:
    rows = words(TextRows(build_corpus(TEXTS, ByteTokenizer()), SETTING, seed=0)(0, 4))
    whole = {"abcd", "efgh", "ghij", "0123", "KLMN", "OPQR"}  # a document's last row ends with it
    assert len(rows) == 12
    assert set(rows[:6]) == set(rows[6:]) == whole  # two epochs
    assert rows[:6] != rows[6:]


def test_the_order_follows_from_the_seed() -> None:
    corpus = build_corpus(TEXTS, ByteTokenizer())
    rows, again, other = (TextRows(corpus, SETTING, seed) for seed in (1, 1, 2))
    assert torch.equal(rows(0, 4), again(0, 4))
    assert not torch.equal(rows(0, 4), other(0, 4))
    assert torch.equal(torch.cat([rows(0, 1), rows(1, 3)]), rows(0, 4))  # however many steps are brought at once


def test_text_shorter_than_a_row_is_told() -> None:
    corpus = build_corpus(TEXTS, ByteTokenizer())
    with pytest.raises(UserError, match=r"no document of the text has 11 tokens, a row's length"):
        TextRows(corpus, replace(SETTING, sequence_length=11), 0)


def test_the_library_is_split_by_file_and_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"module{index}.py").write_text(f"x{index} = {index}\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "left_out.py").write_text("y = 0\n")
    monkeypatch.setattr(text_training.sysconfig, "get_path", lambda name: str(tmp_path) if name == "purelib" else "")
    setting = replace(SETTING, text="packages", max_files=20)
    train, held_out = corpora(setting)
    assert (len(train), len(held_out)) == (19, 1)
    assert corpora(replace(setting, steps=9))[0] is train
    files = [part.document(i).tobytes().decode() for part in (train, held_out) for i in range(len(part))]
    assert len(set(files)) == 20 and all(file.startswith("x") for file in files)
    text_training._read.cache_clear()


def test_the_loss_that_is_told_leaves_the_routers_out() -> None:
    moe = MoEConfig(num_experts=2, top_k=1, intermediate_size=8, activation="relu", load_balance_coef=0.5)
    model = build(ModelConfig(hidden_size=16, layers=(LayerSpec("mamba1", "moe"),), moe=moe), seed=0).train()
    ids = torch.randint(256, (2, 9))
    trained, told = text_loss(model, PRECISIONS["float32"])(ids)
    logits = model(ids).logits
    assert logits is not None
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)
    assert 0.4 < (trained - told).item() < 1.0  # about 0.5: balanced experts


def curve(variant: str, seed: int, offset: float) -> list[dict]:
    rows = [{"step": step, "bits_per_byte": 4 / step + seed + offset * step} for step in range(1, 8)]
    rows.append({"held_out": 2.0 + offset, "parameters": 1234})
    return [{"variant": variant, "seed": seed} | row for row in rows]


def test_gaps_are_taken_seed_by_seed() -> None:
    rows = [row for seed in (0, 1) for row in curve("base", seed, 0.0)] + curve("worse", 1, 0.1)
    text = HeldOut(rows, {"base": "", "worse": "", "absent": ""})
    training, gaps = text.plots("base")
    assert [line.label for line in training.lines] == ["base", "worse"]
    (gap,) = gaps.lines
    assert list(gap.x) == [3, 4, 5] and gap.y == pytest.approx([0.3, 0.4, 0.5])  # means of 5 points


def test_orders_and_figures() -> None:
    rows = [*curve("base", 0, 0.0), *curve("base", 1, 0.0), *curve("worse", 0, 0.1)]
    text = HeldOut(rows, {"worse": "", "base": "", "absent": ""})
    assert text.present == ["worse", "base"]
    assert text.falls("worse", "base") is True
    assert text.falls("base", "worse") is False
    assert text.falls("worse", "base", "absent") is None
    assert text.figure("base") == "2.000 (2.000 to 2.000)" and text.parameters("worse") == "1,234"
