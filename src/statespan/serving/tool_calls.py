"""Tool calls in a model's reply: found in the text by the markers that the chat template uses."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from statespan.checkpoints.tokenizer import FileTokenizer
from statespan.generation.stopping import StopStrings
from statespan.generation.streaming import TextDecoder
from statespan.models.language_model import Tokenizer

# What stands before and after the JSON of a call, or of a list of calls.
MARKERS = (
    ("<tool_calls>", "</tool_calls>"),  # Jamba-1.5: a list
    ("<tool_call>", "</tool_call>"),  # Hermes, Qwen: one call in each pair
    ("[TOOL_CALLS]", ""),  # Mistral: a list
)
LISTS = ("<tool_calls>", "[TOOL_CALLS]")


@dataclass(frozen=True)
class ToolCall:
    """One call."""

    name: str
    arguments: str  # JSON of an object


def markers_of(template: str) -> tuple[str, str] | None:
    """How a chat template's model writes its calls, or None where it uses no form known here."""
    return next((markers for markers in MARKERS if markers[0] in template), None)


@dataclass(frozen=True)
class CallFormat:
    """What a reply must be that has to call functions: data that can be sent to another process."""

    markers: tuple[str, str]
    functions: tuple[tuple[str, str], ...]  # names, and JSON schemas of the arguments as text
    several: bool = False  # whether more than one call may come

    def grammar(self, space: str, token_of: Callable[[str], int | None]) -> str:
        """The format for llguidance, in its Lark syntax.

        Args:
            space: a regular expression of what may stand between the parts of the arguments.
            token_of: the id of a text that is a special token.
        """
        opening, closing = (_terminal(marker, token_of(marker)) for marker in self.markers)
        is_list = self.markers[0] in LISTS
        more, again = (' (", " call)*', " (gap one)*") if self.several else ("", "")
        lines = [
            "start: one" + ("" if is_list else again),
            f"one: {opening} gap "
            + (f'"[" call{more} "]"' if is_list else "call")
            + (f" gap {closing}" if closing else ""),
            "call: " + " | ".join(f"call_{place}" for place in range(len(self.functions))),
            r"gap: /[ \n]?/",
        ]
        for place, (name, schema) in enumerate(self.functions):
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            arguments = json.dumps({"x-guidance": {"whitespace_pattern": space}} | json.loads(schema))
            lines += [f'call_{place}: {begin} arguments_{place} "}}"', f"arguments_{place}: %json {arguments}"]
        return "\n".join(lines)


def _terminal(text: str, token_id: int | None) -> str:
    if token_id is not None:
        return f"<[{token_id}]>"
    return json.dumps(text) if text else ""


class ToolCallParser:
    """A reply goes in piece by piece; text that belongs to no call comes out at once, the calls at the end.

    Example:
        >>> parser = ToolCallParser(("<tool_call>", "</tool_call>"))
        >>> parser.push("Let me see. <tool"), parser.push('_call>{"name": "f", "arguments": {"x": 1}}</tool_call>')
        ('Let me see. ', '')
        >>> parser.finish()
        ('', [ToolCall(name='f', arguments='{"x": 1}')])
    """

    def __init__(self, markers: tuple[str, str]) -> None:
        self._opening, self._closing = markers
        self._start = StopStrings([self._opening])
        self._text, self._shown = "", 0

    def push(self, piece: str) -> str:
        """The text that is certain to stand before the first call."""
        self._text += piece
        certain = self._start.push(piece)
        self._shown += len(certain)
        return certain

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text held back, which is what cannot be read as calls, and the calls."""
        rest = self._text[self._shown :]
        if not self._start.stopped:
            return rest, []
        calls: list[ToolCall] = []
        text = rest
        while text.startswith(self._opening):
            try:
                value, end = json.JSONDecoder().raw_decode(text[len(self._opening) :].lstrip())
                calls += [_call(item) for item in (value if isinstance(value, list) else [value])]
            except (ValueError, RecursionError):
                return rest, []
            text = text[len(self._opening) :].lstrip()[end:].lstrip().removeprefix(self._closing).lstrip()
        return (text, calls) if calls else (rest, [])


def _call(value: Any) -> ToolCall:
    """One call; ValueError where it is none."""
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        raise ValueError("a call needs a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments are an object")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


class MarkedText:
    """The text of a reply with its special tokens, which events lack; for markers that are such tokens.

    Args:
        tokenizer: of the model.
        prompt: the tokens before the reply.
        stop: strings that end it.
    """

    def __init__(self, tokenizer: FileTokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = TextDecoder(self, prompt)
        self._stops = StopStrings(stop)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._tokenizer.backend.decode(ids, skip_special_tokens=False)

    def push(self, ids: Sequence[int], *, last: bool) -> str:
        """The text that new tokens complete; the end token itself is no text."""
        ids = [i for i in ids if i not in self._tokenizer.eos_ids]
        text = "".join(self._stops.push(self._decoder.push(i)) for i in ids)
        return text + self._stops.push(self._decoder.flush()) + self._stops.flush() if last else text


def special_token(tokenizer: Tokenizer | None, text: str) -> int | None:
    """The id of `text` where it is a token that decoding leaves out."""
    if not isinstance(tokenizer, FileTokenizer):
        return None
    token_id = tokenizer.backend.token_to_id(text)
    return token_id if token_id is not None and tokenizer.decode([token_id]) == "" else None
