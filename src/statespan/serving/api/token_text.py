"""Tokens by name in log-probabilities, in the forms of both kinds of completions."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.generation.batch import TokenLogprob
from statespan.models.language_model import Tokenizer

LEAST = -9999.0  # stands for a probability of 0, which JSON cannot hold


class TokenText:
    """What single tokens are called: their text, or their id where they are no text of their own."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.name = lru_cache(65536)(self._name)

    def _name(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        text = "" if tokenizer is None else tokenizer.decode([token_id])
        if text and "\ufffd" not in text:
            return text
        if isinstance(tokenizer, ByteTokenizer) and token_id < 256:
            return f"bytes:\\x{token_id:02x}"
        special = tokenizer.backend.id_to_token(token_id) if isinstance(tokenizer, FileTokenizer) else None
        return special if special is not None and not text else f"token_id:{token_id}"

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The bytes of a token; None where they are not known."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return [token_id] if token_id < 256 else None
        text = "" if self._tokenizer is None else self._tokenizer.decode([token_id])
        return list(text.encode()) if text and "\ufffd" not in text else None

    def chat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The logprobs object of a chat's choice."""
        content = [
            self._entry(token_id, value.logprob) | {"top_logprobs": [self._entry(*top) for top in value.top]}
            for token_id, value in zip(ids, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token_id), "logprob": max(logprob, LEAST), "bytes": self.bytes_of(token_id)}

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], offset: int = 0
    ) -> dict[str, Any]:
        """The logprobs object of a completion's choice, whose text begins `offset` characters behind the prompt's."""
        names = [self.name(token_id) for token_id in ids]
        offsets: list[int] = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        tops = [value and {self.name(i): max(logprob, LEAST) for i, logprob in value.top} for value in logprobs]
        chosen = [value and max(value.logprob, LEAST) for value in logprobs]
        return {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": offsets}
