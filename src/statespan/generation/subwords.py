"""SubwordVocabulary: a tokenizer's tokens as text, for a subword model that goes on with bytes."""

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel, Tokenizer


class SubwordVocabulary:
    """What each token of a subword model is as text, and which tokens fit a text that has begun.

    Args:
        model: the subword model.
        target: the byte model that it drafts for.
        tokenizer: None: the subword model's own.

    Raises:
        UserError: there is no tokenizer, or the target is no byte model.
    """

    def __init__(self, model: LanguageModel, target: LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        tokenizer = tokenizer or model.tokenizer
        if tokenizer is None:
            raise UserError("the subword model has no tokenizer; pass SubwordDrafter(model, tokenizer)")
        if target.config.vocab_size != 256:
            raise UserError(
                f"a subword drafter is for byte-level models; this one has {target.config.vocab_size} tokens"
            )
        self._tokenizer = tokenizer
        self._pieces = token_texts(tokenizer, model.config.vocab_size)  # sorted
        self._text_of = {token: text for text, token in self._pieces}
        self._token_of = dict(self._pieces)
        self.bos_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]  # before every text

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text that goes on with another one."""
        tokens = self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        return [token for token in tokens if token not in self.bos_ids]

    def text_of(self, token: int) -> bytes:
        """A token as UTF-8; b"" for end tokens and those that are parts of characters."""
        return self._text_of.get(token, b"")

    def likeliest(self, logits: Tensor, begun: Mapping[int, bytes]) -> dict[int, int | None]:
        """For some rows of logits [n v] the likeliest token that begins as their text does, or is its beginning.

        None where no token fits. Rows whose text is empty take the likeliest token of all.
        """
        fitting = {row: self._fitting(text) for row, text in begun.items() if text}
        rows = torch.tensor([row for row, tokens in fitting.items() for _ in tokens], dtype=torch.int64)
        ids = torch.tensor([token for tokens in fitting.values() for token in tokens], dtype=torch.int64)
        values = iter(logits[rows.to(logits.device), ids.to(logits.device)].tolist())
        best = logits.argmax(-1).tolist() if len(fitting) < len(begun) else []
        found: dict[int, int | None] = {row: best[row] for row in begun if row not in fitting}
        for row, tokens in fitting.items():
            found[row] = max(((next(values), token) for token in tokens), default=(0.0, None))[1]
        return found

    def _fitting(self, begun: bytes) -> list[int]:
        first, last = (bisect_left(self._pieces, (text, -1)) for text in (begun, begun + b"\xff"))
        shorter = (self._token_of.get(begun[:size]) for size in range(1, len(begun)))
        return [*(token for _, token in self._pieces[first:last]), *(token for token in shorter if token is not None)]


def last_word(text: bytes) -> int:
    """Where the last word begins, with the space before it."""
    end = len(text.rstrip())
    start = max(text.rfind(space, 0, end) for space in (b" ", b"\n", b"\t"))
    return len(text[: max(start, 0)].rstrip())


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[tuple[bytes, int]]:
    """The text of each token that is whole characters, as UTF-8, with its id; sorted."""
    before = tokenizer.encode("a")[-1:]  # tokenizers drop a leading space at the beginning of a text
    skipped = len(tokenizer.decode(before))
    found: list[tuple[bytes, int]] = []
    for token in range(min(vocab_size, tokenizer.vocab_size)):
        text = tokenizer.decode([*before, token])[skipped:]
        if text and "\ufffd" not in text:
            found.append((text.encode(), token))
    return sorted(found)
