"""The corpus: tokens and their bytes, the split, and its refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from statespan.checkpoints import ByteTokenizer, FileTokenizer
from statespan.errors import DataError, UserError
from statespan.training import DataConfig, TrainingConfig, data
from statespan.training.data import build_corpus, encode_with_bytes, load_data, load_tokenizer

TEXTS = ["hello hello world", "wörld 🎉 日本 hello", " \n hello"]


def byte_level_tokenizer(**special: object) -> FileTokenizer:
    """A byte-level BPE with a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator(["hello world"] * 9, trainer)
    return FileTokenizer(backend, **special)  # type: ignore[arg-type]


def test_bytes_are_tokens():
    corpus = build_corpus(TEXTS, ByteTokenizer())
    assert corpus.tokens.dtype == np.uint8
    assert [corpus.document(i).tobytes().decode() for i in range(3)] == TEXTS
    assert corpus.num_bytes == corpus.num_tokens == sum(len(text.encode()) for text in TEXTS)
    assert corpus.document(1, 2, 5).tobytes() == TEXTS[1].encode()[2:5]
    assert corpus.count_bytes(1, 2, 5) == 3


def test_tokens_of_a_file_and_the_bytes_they_stand_for():
    tokenizer = byte_level_tokenizer(bos_id=0, eos_ids=(1,))
    corpus = build_corpus(TEXTS, tokenizer)
    assert corpus.tokens.dtype == np.uint16
    for index, text in enumerate(TEXTS):
        ids = corpus.document(index).tolist()
        assert (ids[0], ids[-1]) == (0, 1)
        assert tokenizer.decode(ids) == text
        assert corpus.count_bytes(index) == len(text.encode())
        assert corpus.count_bytes(index, 0, 1) == corpus.count_bytes(index, len(ids) - 1) == 0
    assert corpus.num_bytes == sum(len(text.encode()) for text in TEXTS)


def test_bytes_of_each_token_are_those_of_its_text():
    tokenizer = byte_level_tokenizer()
    (ids, counts), (_, pieces) = encode_with_bytes(tokenizer, ["hello world", "é🎉"])
    assert counts.tolist() == [len(tokenizer.decode([i])) for i in ids.tolist()]
    assert (len(pieces), pieces.sum(), pieces[0], pieces[2]) == (6, 6, 2, 4)  # each is a byte; a character counts once


def test_documents_tokenized_together_are_as_each_alone(monkeypatch: pytest.MonkeyPatch):
    tokenizer = byte_level_tokenizer(bos_id=0)
    texts = [*TEXTS, "", *(text * 5 for text in TEXTS)]
    alone = [build_corpus([text], tokenizer) for text in texts]
    for characters in (1, 20, 10_000):
        monkeypatch.setattr(data, "BLOCK_CHARACTERS", characters)
        corpus = build_corpus(iter(texts), tokenizer)
        assert len(corpus) == len(texts)
        for index, other in enumerate(alone):
            assert corpus.document(index).tolist() == other.document(0).tolist()
            assert corpus.count_bytes(index) == other.num_bytes == len(texts[index].encode())


def test_text_that_a_tokenizer_drops_still_counts():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    ((ids, counts),) = encode_with_bytes(FileTokenizer(backend), ["  A  b \n"])
    assert ids.tolist() == [0, 1]
    assert counts.sum() == 8
    assert len(build_corpus(["   ", "a"], FileTokenizer(backend))) == 1


def test_split_is_by_document_without_overlap_and_follows_the_seed(folder: Path, config: TrainingConfig):
    texts = {path.read_bytes() for path in folder.iterdir()}
    seen = set()
    for seed in (0, 0, 1):
        train, held_out = load_data(replace(config.data, seed=seed), ByteTokenizer())
        assert held_out is not None
        sides = [{corpus.document(i).tobytes() for i in range(len(corpus))} for corpus in (train, held_out)]
        assert sides[0] | sides[1] == texts
        assert not sides[0] & sides[1]
        assert len(held_out) == 2  # a fifth of 12
        seen.add((train.fingerprint(), held_out.fingerprint()))
    assert len(seen) == 2


def test_explicit_held_out_files_and_copies_in_the_training_text(tmp_path: Path, config: TrainingConfig, folder: Path):
    held = tmp_path / "held.txt"
    held.write_bytes((folder / "05.txt").read_bytes())
    data = replace(config.data, held_out=str(held))
    train, held_out = load_data(data, ByteTokenizer())
    assert held_out is not None and len(held_out) == 1
    assert len(train) == 11  # 05.txt is left out
    assert held.read_bytes() not in {train.document(i).tobytes() for i in range(11)}
    with pytest.raises(DataError, match="has 0 tokens besides copies of held-out documents"):
        load_data(replace(data, train=str(folder / "05.txt")), ByteTokenizer())


def test_nothing_held_out(config: TrainingConfig):
    train, held_out = load_data(replace(config.data, held_out_fraction=0.0), ByteTokenizer())
    assert held_out is None
    assert len(train) == 12


def test_of_one_long_file_the_end_is_held_out(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i:03d} of the book\n" for i in range(50)))
    text = path.read_bytes()
    data = DataConfig(train=str(path), sequence_length=16)
    train, held_out = load_data(data, ByteTokenizer())
    assert held_out is not None
    assert train.document(0).tobytes() == text[:-52]  # a twentieth of 1,050
    assert held_out.document(0).tobytes() == text[-52:]
    train, held_out = load_data(replace(data, max_document_bytes=200, held_out_fraction=0.1), ByteTokenizer())
    assert held_out is not None and (len(train), len(held_out), held_out.num_bytes) == (5, 1, 9 * 21)


def test_the_end_of_one_long_file_keeps_its_bytes_a_token(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("naïve words, 世界 and more of them\n" * 20)
    data = DataConfig(train=str(path), sequence_length=8, held_out_fraction=0.3)
    train, held_out = load_data(data, byte_level_tokenizer())
    assert held_out is not None and (len(train), len(held_out)) == (1, 1)
    assert held_out.num_tokens == round(0.3 * (train.num_tokens + held_out.num_tokens))
    assert train.num_bytes + held_out.num_bytes == path.stat().st_size


def test_too_few_documents_to_hold_some_out(config: TrainingConfig, folder: Path):
    data = replace(config.data, train=(str(folder / "10.txt"), str(folder / "11.txt")), held_out_fraction=0.9)
    with pytest.raises(DataError, match="no held-out documents: the text is 2 document") as told:
        load_data(data, ByteTokenizer())
    advised = re.search(r"data\.max_document_bytes=(\d+)", str(told.value))
    assert advised is not None
    train, held_out = load_data(replace(data, max_document_bytes=int(advised[1])), ByteTokenizer())
    assert held_out is not None and len(held_out) > len(train) >= 1


def test_too_little_text(config: TrainingConfig):
    message = r"the training text has \d+ tokens, less than one row of data.sequence_length=100000"
    with pytest.raises(DataError, match=message):
        load_data(replace(config.data, sequence_length=100_000), ByteTokenizer())


def test_nothing_to_predict(tmp_path: Path, config: TrainingConfig):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    data = replace(config.data, train=str(tmp_path / "a.jsonl"), sequence_length=2)
    with pytest.raises(DataError, match="no document of the training text has two tokens"):
        load_data(data, ByteTokenizer())


def test_fingerprint_tells_texts_and_orders_apart():
    def corpus(*texts: str) -> str:
        return build_corpus(texts, ByteTokenizer()).fingerprint()

    assert corpus("ab", "c") == corpus("ab", "c")
    assert len({corpus("ab", "c"), corpus("a", "bc"), corpus("c", "ab"), corpus("ab", "d")}) == 4
    both = build_corpus(["ab", "c"], ByteTokenizer())
    assert both.select(np.array([1])).fingerprint() != both.select(np.array([0])).fingerprint()


def test_tokenizer_by_name(tmp_path: Path):
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)
    path = tmp_path / "tokenizer.json"
    byte_level_tokenizer().backend.save(str(path))
    assert load_tokenizer(str(path)).encode("hello") == byte_level_tokenizer().encode("hello")
    with pytest.raises(UserError, match=r"missing\.json: no such tokenizer file"):
        load_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"other\.json"):
        load_tokenizer(str(tmp_path / "other.json"))
