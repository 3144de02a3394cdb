"""Structured output: JSON schemas, JSON and regular expressions as masks over the vocabulary, through llguidance."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from statespan.checkpoints.tokenizer import ByteTokenizer, FileTokenizer
from statespan.errors import UserError, first_line
from statespan.models.language_model import Tokenizer
from statespan.serving.tool_calls import LISTS, CallFormat, special_token

# Space between the parts of a JSON text, as people write it: a model must not fill its reply with spaces.
WHITESPACE = r" |\n[ \t]{0,16}"
BYTES = [bytes([value]) for value in range(256)]


class Constraint(Protocol):
    """What may come next in one reply. It changes with each token accepted."""

    def mask(self) -> Tensor:
        """[v] bool on the CPU: the tokens that may come next; an end token only where the text may end."""
        ...

    def accept(self, token_id: int) -> None:
        """The token was chosen."""
        ...

    def fork(self) -> "Constraint":
        """A constraint of its own at the same place."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more may come: the reply is complete."""
        ...


class GrammarError(UserError):
    """A JSON schema or regular expression that cannot be used; the message says why."""


class Vocabulary:
    """Makes constraints for one tokenizer; it takes a while for a large one, so keep it. For several threads at once.

    Args:
        tokenizer: byte-level, or of a tokenizer.json.
        vocab_size: v, of the model's logits; ids beyond the tokenizer's are never allowed.
        eos_ids: the model's end tokens, besides the tokenizer's.

    Raises:
        UserError: llguidance is not installed, or the tokenizer is of another kind.

    Example:
        >>> from statespan.checkpoints.tokenizer import ByteTokenizer
        >>> yes_or_no = Vocabulary(ByteTokenizer(), 256).regex("yes|no")
        >>> bytes(yes_or_no.mask().nonzero().flatten().tolist())
        b'ny'
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...] = ()) -> None:
        self._library, self._tokenizer = _library(), tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(eos for eos in {*eos_ids, *tokenizer.eos_ids} if eos < vocab_size)
        tokens, encode = _as_text(self._library, tokenizer)
        del tokens[vocab_size:]
        tokens += [b""] * (vocab_size - len(tokens))
        for eos in self._eos_ids:
            tokens[eos] = b""
        wrapper = self._library.TokenizerWrapper(_Tokens(tokens, encode))
        self._tokens = self._library.LLTokenizer(wrapper, n_vocab=vocab_size + 1)

    def json_schema(self, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON text that is valid under `schema`, an object or its text; its parts stand at most a line apart.

        Raises:
            GrammarError: it is no schema, nothing fulfils it, or it has keywords that are not supported.
        """
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            if not isinstance(schema, Mapping):
                raise GrammarError(f"a JSON schema is an object, got {type(schema).__name__}")
            options = {"whitespace_pattern": WHITESPACE}
            grammar = self._library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, GrammarError):
                raise
            raise GrammarError(f"the JSON schema cannot be used: {_told(error)}") from None
        return self._constraint(grammar, "JSON schema")

    def json_object(self) -> Constraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Constraint:
        """Text that matches all of `pattern`, in the syntax of Rust's regex: without look-around and back-references.

        Raises:
            GrammarError: the pattern cannot be read.
        """
        return self._constraint(self._library.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def tool_calls(self, calls: CallFormat) -> Constraint:
        """Calls of functions and nothing else.

        Raises:
            GrammarError: the arguments' schema of a function cannot be used.
        """
        if not self._eos_ids and calls.markers[0] not in LISTS:
            calls = replace(calls, several=False)  # nothing would say which is the last one
        grammar = calls.grammar(WHITESPACE, partial(special_token, self._tokenizer))
        return self._constraint(grammar, "JSON schema of a function's parameters")

    def _constraint(self, grammar: str, kind: str) -> Constraint:
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the {kind} cannot be used: {_told(matcher.get_error())}")
        return _GrammarConstraint(matcher, self._vocab_size, self._eos_ids)


class _GrammarConstraint:
    """A Constraint over a matcher of llguidance, whose own end token is the id behind the vocabulary."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: tuple[int, ...], ended: bool = False) -> None:
        self._matcher, self._vocab_size, self._eos_ids = matcher, vocab_size, eos_ids
        self._ended = ended  # an end token came

    def mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_sound()
        allowed = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little")).bool()
        may_end, allowed = bool(allowed[-1]), allowed[:-1]
        allowed[list(self._eos_ids)] = may_end
        return allowed

    def accept(self, token_id: int) -> None:
        if token_id in self._eos_ids and self._matcher.is_accepting():
            self._ended = True
        elif self._ended or self._matcher.try_consume_tokens([token_id]) != 1:
            self._require_sound()
            raise GrammarError(f"token {token_id} is not what the grammar allows here")

    def fork(self) -> "_GrammarConstraint":
        return _GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._eos_ids, self._ended)

    @property
    def finished(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def _require_sound(self) -> None:
        if not self._matcher.is_error():
            return
        error = self._matcher.get_error()
        if "NoExtension" in error:
            raise GrammarError("no token of the vocabulary can go on with what the grammar asks for")
        raise GrammarError(f"the grammar became too complex: {_told(error)}")


class _Tokens:
    """A vocabulary in the form in which llguidance asks for one. It encodes text that can be nothing else."""

    bos_token_id: int | None = None

    def __init__(self, tokens: list[bytes], encode: Callable[[str], list[int]]) -> None:
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [self.eos_token_id]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _as_text(library: Any, tokenizer: Tokenizer) -> tuple[list[bytes], Callable[[str], list[int]]]:
    """The bytes of each token, none for special ones, and a function from text to tokens that are no special ones."""
    if isinstance(tokenizer, ByteTokenizer):
        return list(BYTES), tokenizer.encode
    if not isinstance(tokenizer, FileTokenizer):
        name = type(tokenizer).__name__
        raise UserError(f"structured output needs a byte-level tokenizer or a tokenizer.json, not {name}")
    try:
        tokens = library.LLTokenizer(tokenizer.backend.to_str(), eos_token=0)
    except ValueError as error:
        raise UserError(f"structured output cannot read this tokenizer: {_told(error)}") from None
    plain = copy.deepcopy(tokenizer.backend)
    plain.encode_special_tokens = True
    ids = range(tokens.vocab_size)
    return (
        [b"" if tokens.is_special_token(token) else tokens.decode_bytes([token]) for token in ids],
        lambda text: plain.encode(text, add_special_tokens=False).ids,
    )


def _library() -> Any:
    try:
        import llguidance  # not everybody who serves needs it
    except ImportError:
        raise UserError("structured output needs llguidance: pip install 'statespan[serve]'") from None
    return llguidance


def _told(error: object) -> str:
    """The library's reason in one line; of a regex error the last line says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    return first_line(reason.removeprefix("error: "))
