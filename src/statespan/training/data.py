"""Corpus: the tokens of all documents in memory, each token with the number of bytes of text it stands for."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.errors import DataError
from statespan.training.config import DataConfig
from statespan.training.documents import find_files, read_documents

Integers = NDArray[np.integer]
BLOCK_CHARACTERS = 1 << 20  # of documents that are tokenized side by side; their encodings take some 30 MB


@dataclass(frozen=True)
class Corpus:
    """Documents as stretches of one array of tokens, which selections share."""

    tokens: Integers  # [tokens] uint8, uint16 or uint32
    token_bytes: Integers | None  # [tokens] uint32, bytes of text a token; None: one each
    starts: NDArray[np.int64]  # [documents], first token of each
    lengths: NDArray[np.int64]  # [documents], tokens of each

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of UTF-8 text of all documents."""
        if self.token_bytes is None:
            return self.num_tokens
        return sum(self.count_bytes(i) for i in range(len(self)))

    def document(self, index: int, start: int = 0, stop: int | None = None) -> Integers:
        """Tokens `start` to `stop` of a document, a view."""
        return self.tokens[self._place(index, start, stop)]

    def count_bytes(self, index: int, start: int = 0, stop: int | None = None) -> int:
        """Bytes of text of tokens `start` to `stop` of a document."""
        place = self._place(index, start, stop)
        if self.token_bytes is None:
            return place.stop - place.start
        return int(self.token_bytes[place].sum(dtype=np.int64))

    def _place(self, index: int, start: int, stop: int | None) -> slice:
        length = int(self.lengths[index])
        first, stop = int(self.starts[index]), length if stop is None else min(stop, length)
        return slice(first + start, first + stop)

    def cut(self, index: int, place: int) -> tuple["Corpus", "Corpus"]:
        """A document's tokens up to `place`, and those from there on, as a corpus each; the tokens are shared."""
        start, length = self.starts[index], self.lengths[index]
        return (
            Corpus(self.tokens, self.token_bytes, np.array([start]), np.array([place])),
            Corpus(self.tokens, self.token_bytes, np.array([start + place]), np.array([length - place])),
        )

    def select(self, documents: Integers) -> "Corpus":
        """The chosen documents in the order given; the tokens are shared."""
        return Corpus(self.tokens, self.token_bytes, self.starts[documents], self.lengths[documents])

    def fingerprint(self) -> str:
        """A hash of the tokens and of the choice and order of the documents."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.tokens, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_tokenizer(name: str) -> ByteTokenizer | FileTokenizer:
    """ "bytes", or the tokenizer of a tokenizer.json file."""
    if name == "bytes":
        return ByteTokenizer()
    if not Path(name).is_file():
        raise DataError(f"{name}: no such tokenizer file; set data.tokenizer to a tokenizer.json, or to bytes")
    return FileTokenizer.from_file(name)


def build_corpus(texts: Iterable[str], tokenizer: ByteTokenizer | FileTokenizer) -> Corpus:
    """Tokenize documents; with a tokenizer file each gets the beginning and end token that the tokenizer has."""
    size = tokenizer.vocab_size
    dtype = np.uint8 if size <= 2**8 else np.uint16 if size <= 2**16 else np.uint32
    tokens, token_bytes, lengths = bytearray(), bytearray(), list[int]()
    if isinstance(tokenizer, ByteTokenizer):
        documents = ((np.frombuffer(text.encode(), np.uint8), None) for text in texts)
    else:
        documents = (document for block in _blocks(texts) for document in encode_with_bytes(tokenizer, block))
    for ids, counts in documents:
        if counts is not None:
            token_bytes += counts.astype(np.uint32).tobytes()
        if len(ids):  # a tokenizer may drop white space
            tokens += ids.astype(dtype).tobytes()
            lengths.append(len(ids))
    sizes = np.array(lengths, np.int64)
    return Corpus(
        np.frombuffer(tokens, dtype),
        None if isinstance(tokenizer, ByteTokenizer) else np.frombuffer(token_bytes, np.uint32),
        np.cumsum(sizes) - sizes,
        sizes,
    )


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Documents that are tokenized at once, side by side: as many as reach BLOCK_CHARACTERS."""
    block, size = list[str](), 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def encode_with_bytes(tokenizer: FileTokenizer, texts: Sequence[str]) -> Iterator[tuple[Integers, Integers]]:
    """Token ids of each document and the bytes of it that each one adds; the sum is len(text.encode()).

    Tokens that are byte-level pieces of one character count it once, with the first of them; text that the tokenizer
    drops counts with the token after it, or with the last. Beginning and end tokens add none.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = list(tokenizer.eos_ids[:1])
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        counts = _bytes_of_tokens(text, [end for _, end in encoding.offsets])
        yield (
            np.array(begin + encoding.ids + end, np.int64),
            np.concatenate([np.zeros(len(begin), np.int64), counts, np.zeros(len(end), np.int64)]),
        )


def _bytes_of_tokens(text: str, ends: Sequence[int]) -> Integers:
    """The bytes that each token adds, by the characters where they end."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    before = np.concatenate([[0], np.cumsum(widths)])  # bytes before each character
    covered = np.maximum.accumulate(before[np.array(ends, np.int64)])
    covered[-1:] = before[-1]
    return np.diff(covered, prepend=0)


def load_data(config: DataConfig, tokenizer: ByteTokenizer | FileTokenizer) -> tuple[Corpus, Corpus | None]:
    """The training and the held-out corpus that `config` describes; no held-out one where its fraction is 0.

    Documents are held out whole, drawn with the seed; of a single document, such as a book, its end is. Training
    documents equal to a held-out one are left out.

    Raises DataError for text that cannot be read, nothing to hold out, or less text than one row.
    """

    def read(paths: str | tuple[str, ...]) -> Corpus:
        files = find_files(paths, config.exclude)
        return build_corpus(read_documents(files, config.text_field, config.max_document_bytes), tokenizer)

    train, held_out = read(config.train), None
    if config.held_out:
        held_out = read(config.held_out)
    elif config.held_out_fraction > 0:
        train, held_out = _split(train, config)
    kept = train if held_out is None else _without_copies(train, held_out)
    if kept.num_tokens < config.sequence_length:
        copies = " besides copies of held-out documents" if len(kept) < len(train) else ""
        raise DataError(
            f"the training text has {kept.num_tokens} tokens{copies}, less than one row of "
            f"data.sequence_length={config.sequence_length}; give more text or a smaller sequence_length"
        )
    if kept.lengths.max() < 2:
        raise DataError("no document of the training text has two tokens, so there is nothing to predict")
    return kept, held_out


def _split(corpus: Corpus, config: DataConfig) -> tuple[Corpus, Corpus]:
    if len(corpus) == 1 and corpus.num_tokens > 1:
        return corpus.cut(0, corpus.num_tokens - max(1, round(config.held_out_fraction * corpus.num_tokens)))
    count = max(1, round(config.held_out_fraction * len(corpus)))
    if len(corpus) <= count:
        piece = min(65536, max(1, corpus.num_bytes // 20))  # so that there are 20 pieces at least
        raise DataError(
            f"no held-out documents: the text is {len(corpus)} document(s); name files in data.held_out, cut it with "
            f"data.max_document_bytes={piece}, or set data.held_out_fraction=0"
        )
    order = np.random.default_rng(config.seed).permutation(len(corpus))
    return corpus.select(np.sort(order[count:])), corpus.select(np.sort(order[:count]))


def _without_copies(train: Corpus, held_out: Corpus) -> Corpus:
    """`train` without the documents that are also in `held_out`, which would make its figure too good."""
    copies = {held_out.document(i).tobytes() for i in range(len(held_out))}
    suspects = np.flatnonzero(np.isin(train.lengths, held_out.lengths))
    leaked = [int(i) for i in suspects if train.document(int(i)).tobytes() in copies]
    return train.select(np.delete(np.arange(len(train)), leaked)) if leaked else train
