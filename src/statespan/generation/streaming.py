"""What a stream yields, and how token ids become growing text: whole characters, spaces as in the whole text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from statespan.generation.batch import TokenLogprob
from statespan.generation.state import GenerationState

FinishReason = Literal["stop", "length", "eos"]

_REPLACEMENT = "\ufffd"  # what tokenizers decode bytes to that are no character, or not yet one
_MAX_PENDING = 3  # bytes of a character that is not complete, and so the most tokens or marks that wait for its end
_CONTEXT = 8  # tokens of the prompt that decide about the space before the first new word
_WINDOW = 64  # tokens decoded again with each new one, at most: only text that is not UTF-8 gets there


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One new token of one prompt. The last event of a prompt has a finish_reason."""

    index: int  # which prompt
    text: str  # what the token completes; may be "", and at the end carries what was held back
    token_id: int | None  # None only in the single event of max_new_tokens=0
    logprob: TokenLogprob | None = None  # with the option logprobs
    finish_reason: FinishReason | None = None
    state: GenerationState | None = None  # in the last event, with return_state


class Decodes(Protocol):
    """The part of a tokenizer that turns ids into text; bytes that are no character become U+FFFD."""

    def decode(self, ids: list[int]) -> str: ...


class TextDecoder:
    """Token ids go in one by one; the text that each adds comes out, and no character before it is complete.

    Tokenizers drop a leading space or join pieces, so a token is decoded behind the ones before it and what they gave
    is cut off. Bytes that can no longer become a character come out as U+FFFD, as in `bytes.decode(errors="replace")`.
    """

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first one, the prompt's."""
        self._tokenizer = tokenizer
        ids = _from_a_character(tokenizer, context[-_CONTEXT:])
        whole = next(end for end in range(len(ids), -1, -1) if not tokenizer.decode(ids[:end]).endswith(_REPLACEMENT))
        self._ids = ids[:whole]  # the window: context, then the newest tokens
        self._shown = len(tokenizer.decode(self._ids))
        self._unsettled = 0  # tokens since the text last ended in a whole character
        for token_id in ids[whole:]:  # the beginning of a character that the first tokens may complete
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, or ""."""
        self._ids.append(token_id)
        self._unsettled += 1
        text = self._tokenizer.decode(self._ids)
        doubtful = len(text) - len(text.rstrip(_REPLACEMENT))
        if self._unsettled > _MAX_PENDING:
            doubtful = min(doubtful, _MAX_PENDING)
        end = len(text) - doubtful
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        if piece and not doubtful:
            del self._ids[: -self._unsettled]
            self._shown, self._unsettled = len(self._tokenizer.decode(self._ids)), 0
        elif len(self._ids) > _WINDOW:
            self._shorten(text)
        return piece

    def _shorten(self, text: str) -> None:
        """Start the window later, where decoding in two parts gives the same text."""
        for start in range(len(self._ids) - 1, len(self._ids) - 2 * _MAX_PENDING, -1):
            left = self._tokenizer.decode(self._ids[:start])
            if len(left) <= self._shown and left + self._tokenizer.decode(self._ids[start:]) == text:
                del self._ids[:start]
                self._shown -= len(left)
                return

    def flush(self) -> str:
        """The text held back, once no more tokens follow."""
        text = self._tokenizer.decode(self._ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece


def _from_a_character(tokenizer: Decodes, ids: Sequence[int]) -> list[int]:
    """`ids` without the rest of a character whose beginning was cut off."""
    for start in range(min(_MAX_PENDING + 1, len(ids))):
        if not tokenizer.decode(list(ids[start:])).startswith(_REPLACEMENT):
            return list(ids[start:])
    return list(ids)
