"""TextDecoder: bytes, byte-level BPE and sentencepiece-like tokenizers, emoji split over tokens, invalid bytes."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from statespan.generation.streaming import TextDecoder

TEXT = "Hello  world! Ünï çode: 日本語, emoji 😀👩‍👩‍👧 end.\n"


class Bytes:
    """One token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Library:
    """A tokenizer of the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def byte_level() -> Library:
    """Byte-level BPE; some merges end in the middle of a character, as in real vocabularies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_letter = {byte: letter for letter in alphabet for byte in [_byte_of(letter)]}
    pairs = [(b"l", b"l"), (b"o", b" "), (b"\xf0", b"\x9f"), (b"\x80", b"\xf0"), (b" ", b"w"), (b"\x97", b"\xa5")]
    merges = [("".join(to_letter[b] for b in left), "".join(to_letter[b] for b in right)) for left, right in pairs]
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Library(tokenizer)


def _byte_of(letter: str) -> int:
    """The byte of a letter of the byte-level alphabet: in GPT-2's table printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(letter) in printable:
        return ord(letter)
    return [byte for byte in range(256) if byte not in printable][ord(letter) - 256]


def sentencepiece() -> Library:
    """Words with a space mark in front; what the vocabulary lacks becomes bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "!", "▁end", "."]
    letters = [letter for word in words[257:] for letter in word]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words[:257], *letters, *words[257:]]))}
    merges: list[tuple[str, str]] = []
    for word in ("▁Hello", "▁world", "▁end"):
        for end in range(1, len(word)):
            if (word[:end], word[end]) not in merges:
                merges.append((word[:end], word[end]))
                vocabulary.setdefault(word[: end + 1], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Library(tokenizer)


TOKENIZERS = [Bytes, byte_level, sentencepiece]


def stream(tokenizer: Bytes | Library, ids: list[int], context: list[int] | None = None) -> list[str]:
    decoder = TextDecoder(tokenizer, context or [])
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_are_whole_characters_and_join_to_the_text(make: type[Bytes]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT, "the tokenizer of the test must keep the text"
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_text_goes_on_behind_every_prompt(make: type[Bytes]) -> None:
    """The space before the first new word is there, wherever the prompt ends."""
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if before.endswith("\ufffd") or not TEXT.startswith(before):
            continue  # a prompt that is no text
        assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == TEXT


def test_a_character_comes_with_its_last_byte_and_not_before() -> None:
    assert stream(Bytes(), list("é😀a".encode())) == ["", "é", "", "", "", "😀", "a", ""]


def test_a_prompt_may_end_inside_a_character() -> None:
    data = list("😀".encode())
    assert stream(Bytes(), data[2:], data[:2]) == ["", "😀", ""]


@pytest.mark.parametrize(
    "alphabet",
    [range(256), [0x80, 0xBF, 0xF0, 0x9F, 0x98, 0x41, 0xE2, 0x82], [0x80, 0xF0, 0x9F, 0x98], [0x80] * 90 + [0xF0]],
    ids=["all", "broken", "continuations", "one kind"],
)
def test_invalid_bytes_become_replacement_characters(alphabet: list[int]) -> None:
    chance = random.Random(0)
    for _ in range(150):
        data = chance.choices(list(alphabet), k=chance.randint(1, 300))
        assert "".join(stream(Bytes(), data)) == bytes(data).decode(errors="replace")


@pytest.mark.parametrize("make", TOKENIZERS)
def test_junk_is_shown_soon_and_the_window_stays_short(make: type[Bytes]) -> None:
    """A thousand bytes that are no text: they do not pile up, and text behind them is right again."""
    tokenizer = make()
    junk = tokenizer.encode("日")[-1]
    decoder = TextDecoder(tokenizer)
    shown = 0
    for count in range(1, 1001):
        shown += len(decoder.push(junk))
        assert shown >= count - 4
        assert len(decoder._ids) <= 80
    rest = "".join(decoder.push(token_id) for token_id in tokenizer.encode("! Hello 😀!")) + decoder.flush()
    assert rest.lstrip("\ufffd").lstrip(" ") == "! Hello 😀!"


def test_tokens_without_text_do_not_eat_the_next_space() -> None:
    """Special tokens decode to nothing; the word behind them keeps its space."""
    tokenizer = sentencepiece()
    tokenizer.tokenizer.add_special_tokens(["<sep>"])
    special = tokenizer.tokenizer.token_to_id("<sep>")
    world = tokenizer.tokenizer.token_to_id("▁world")
    assert "".join(stream(tokenizer, [special, special, world], tokenizer.encode("Hello"))) == " world"
