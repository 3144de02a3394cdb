"""Tool calls are found in replies, however these are cut into pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statespan.serving.tool_calls import MARKERS, ToolCall, ToolCallParser, markers_of

HERMES, JAMBA, MISTRAL = MARKERS[1], MARKERS[0], MARKERS[2]
SECOND = '{"name":"mul","arguments":{"b":"ü"}}'
QUOTED = '{"name": "mul", "arguments": "{\\"b\\": \\"ü\\"}"}'
CALL = '{"name": "add", "arguments": {"a": 1}}'
ADD, MUL = ToolCall("add", '{"a": 1}'), ToolCall("mul", '{"b": "ü"}')


def parse(markers: tuple[str, str], pieces: list[str]) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(markers)
    text = "".join(parser.push(piece) for piece in pieces)
    rest, calls = parser.finish()
    return text + rest, calls


REPLIES = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [ADD]),
    (HERMES, f"Let me add. <tool_call>{CALL}</tool_call>", "Let me add. ", [ADD]),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_call>{SECOND}</tool_call>", "", [ADD, MUL]),
    (HERMES, f"<tool_call>{CALL}", "", [ADD]),  # the end token came before the closing mark
    (JAMBA, f"<tool_calls>[\n {CALL}, {QUOTED}]</tool_calls>", "", [ADD, MUL]),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}]", "", [ADD]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", "{}")]),
    (HERMES, f"<tool_call>{CALL}</tool_call> and on", " and on".lstrip(), [ADD]),
    # What cannot be read is text.
    (HERMES, "no call at all < tool", "no call at all < tool", []),
    (HERMES, "<tool_call>{broken", "<tool_call>{broken", []),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
    (HERMES, "<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
    (HERMES, "ends in <tool_", "ends in <tool_", []),
]  # fmt: skip


@pytest.mark.parametrize(("markers", "reply", "text", "calls"), REPLIES, ids=[reply[1][:30] for reply in REPLIES])
def test_calls_and_text(markers: tuple[str, str], reply: str, text: str, calls: list[ToolCall]) -> None:
    assert parse(markers, [reply]) == (text, calls)
    if len(reply) < 1000:
        assert parse(markers, list(reply)) == (text, calls)


@given(st.sampled_from(REPLIES[:6]), st.lists(st.integers(1, 200), max_size=6))
def test_the_cuts_do_not_matter(reply: tuple[tuple[str, str], str, str, list[ToolCall]], cuts: list[int]) -> None:
    markers, whole, text, calls = reply
    places = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    assert parse(markers, [whole[a:b] for a, b in pairwise(places)]) == (text, calls)


def test_text_before_a_call_is_not_held_back() -> None:
    parser = ToolCallParser(HERMES)
    assert parser.push("Let me see <to") == "Let me see "
    assert parser.push("morrow") == "<tomorrow"


def test_the_template_tells_the_form() -> None:
    assert markers_of("...'<tool_call>\\n'...") == HERMES
    assert markers_of("...<tool_calls>[...") == JAMBA
    assert markers_of("plain") is None
