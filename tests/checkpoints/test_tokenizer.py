"""Tokenizers: bytes and tokenizer.json, with the ids that begin and end a text."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from statespan.checkpoints import ByteTokenizer, FileTokenizer, load, save
from statespan.errors import CheckpointError, UserError
from statespan.models.config import ModelConfig


@pytest.fixture
def word_tokenizer() -> Tokenizer:
    """Words with a leading <s>, as Llama and Jamba have."""
    words = {"<s>": 0, "</s>": 1, "the": 2, "cat": 3, "[UNK]": 4, "<|end|>": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def folder(word_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["", "plain", "né 漢字 🐍", "a\x00b\r\n"])
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (256, None, ())


def test_broken_bytes_become_replacement_characters() -> None:
    assert ByteTokenizer().decode([0xE6, 0xBC, 65]) == "\ufffdA"
    assert ByteTokenizer().encode("\udce6A") == [0xE6, 65]  # how Python hands over an argument that is not UTF-8


def test_ids_beyond_bytes_become_replacement_characters() -> None:
    """A model may have more ids than bytes; such an id is no text, and ends a character that was not complete."""
    assert ByteTokenizer().decode([65, 256, 66]) == "A\ufffdB"
    assert ByteTokenizer().decode([0xC3, 300, 0xA9, 0xC3, 0xA9]) == "\ufffd\ufffd\ufffdé"


def test_negative_id_is_named() -> None:
    with pytest.raises(UserError, match="token id -1 is negative"):
        ByteTokenizer().decode([65, -1])


def test_file_tokenizer_reads_ids_from_its_settings(folder: Path) -> None:
    settings = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = FileTokenizer.from_file(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1,), 6)
    assert tokenizer.encode("the cat") == [0, 2, 3]
    assert tokenizer.encode("the cat", add_special_tokens=False) == [2, 3]
    assert tokenizer.decode([0, 2, 3, 1]) == "the cat"


def test_texts_are_encoded_whole_whatever_the_file_asks_for(word_tokenizer: Tokenizer, tmp_path: Path) -> None:
    word_tokenizer.enable_truncation(3)
    word_tokenizer.enable_padding(length=6)
    word_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.encode("the cat the cat") == [0, 2, 3, 2, 3]
    assert tokenizer.encode("cat") == [0, 3]


def test_without_settings_there_are_no_ids(folder: Path) -> None:
    tokenizer = FileTokenizer.from_file(folder / "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())


def test_the_tokenizer_travels_with_the_model(folder: Path, build_random: Any, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ x }}"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    model = build_random(ModelConfig(vocab_size=6, hidden_size=8, eos_token_ids=(1, 5)))
    model.tokenizer = FileTokenizer.from_file(folder / "tokenizer.json")
    for format_name in ("statespan", "transformers"):
        target = tmp_path / format_name
        save(model, target, format_name)
        back = load(target)
        assert isinstance(back.tokenizer, FileTokenizer)
        assert back.tokenizer.encode("cat the") == [0, 3, 2]
        assert back.tokenizer.eos_ids == (1, 5)  # those of the model go before those of tokenizer_config.json
        assert back.tokenizer.settings == model.tokenizer.settings
        assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
        model.tokenizer.chat_template = None
        save(model, target, format_name)
        assert not (target / "chat_template.jinja").exists()  # of the checkpoint that was there
        model.tokenizer.chat_template = "{{ messages }}"


def test_generation_config_goes_before_config(build_random: Any, tmp_path: Path) -> None:
    save(build_random(ModelConfig(vocab_size=6, hidden_size=8, eos_token_ids=(1,))), tmp_path, "transformers")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5], "bos_token_id": 2}))
    config = load(tmp_path).config
    assert (config.eos_token_ids, config.bos_token_id) == ((3, 5), 2)


def test_bytes_only_for_a_vocabulary_of_bytes(build_random: Any, tmp_path: Path) -> None:
    for size, kind in ((256, ByteTokenizer), (300, type(None))):
        save(build_random(ModelConfig(vocab_size=size, hidden_size=8)), tmp_path / str(size))
        assert isinstance(load(tmp_path / str(size)).tokenizer, kind)


def test_a_saved_byte_model_does_not_keep_an_older_tokenizer(folder: Path, build_random: Any) -> None:
    save(build_random(ModelConfig(vocab_size=256, hidden_size=8)), folder)
    assert isinstance(load(folder).tokenizer, ByteTokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("{", "is not JSON"), ("{}", "is no tokenizer"), (None, "is missing")],
)
def test_bad_tokenizer_files(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        FileTokenizer.from_file(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
