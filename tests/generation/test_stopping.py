"""Stop strings: the outcome does not depend on how the text is cut into pieces, and no beginning leaks."""

import random

from statespan.generation.stopping import StopStrings


def plain_end(text: str, stops: list[str]) -> int | None:
    """Where the text ends, from the definition: the first place where a stop string is complete; the longest there."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return min(found)
    return None


def feed(pieces: list[str], stops: StopStrings) -> str:
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.stopped:
            break
    return shown + stops.flush()


def test_random_texts_in_random_pieces_end_where_the_definition_says() -> None:
    chance = random.Random(0)
    ended = 0
    for _ in range(3000):
        text = "".join(chance.choices("ab", k=chance.randint(0, 14)))
        strings = ["".join(chance.choices("ab", k=chance.randint(1, 5))) for _ in range(chance.randint(1, 3))]
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 6)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        stops = StopStrings(strings)
        end = plain_end(text, strings)
        shown = ""
        for count, piece in enumerate(pieces):
            shown += stops.push(piece)
            # What is shown can never be taken back.
            assert text[: len(text) if end is None else end].startswith(shown), (pieces[: count + 1], strings)
            if stops.stopped:
                break
        assert stops.stopped == (end is not None)
        assert shown + stops.flush() == text[:end]
        ended += end is not None
    assert 500 < ended < 2900


def test_no_more_is_held_back_than_could_become_a_stop_string() -> None:
    stops = StopStrings(["\n\nQ:", "END"])
    assert stops.push("a\n") == "a"
    assert stops.push("b") == "\nb"
    assert stops.push("E") == ""
    assert stops.push("N") == ""
    assert stops.push("E") == "EN"
    assert stops.push("ND, more") == ""
    assert stops.stopped
    assert stops.push("and more") == ""
    assert stops.flush() == ""


def test_a_stop_string_may_stand_inside_a_piece_or_span_many() -> None:
    assert feed(["one END two"], StopStrings(["END"])) == "one "
    assert feed(list("one END two"), StopStrings(["END"])) == "one "


def test_without_a_stop_string_nothing_is_held() -> None:
    assert StopStrings([]).push("text") == "text"
