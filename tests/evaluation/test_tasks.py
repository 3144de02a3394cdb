"""Every task can be answered by a reader of the past alone, its rows follow from the seed, bad sizes get one line."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.evaluation import (
    TaskBatch,
    associative_recall,
    copying,
    induction_heads,
    needle,
    phonebook,
    selective_copying,
)

Reader = Callable[[list[int]], int]  # what has been read -> the answer


def check_answers(batch: TaskBatch, answer: Reader, num_asked: int) -> None:
    """Each asked label is what `answer` makes of the tokens before it, and as many are asked as should be."""
    assert batch.input_ids.shape == batch.labels.shape
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_asked == num_asked
    places, answers = (value.tolist() for value in batch.asked())
    for row, labels in enumerate(batch.labels.tolist()):
        wanted = [(place - 1, label) for place, label in enumerate(labels) if label >= 0]
        assert list(zip(places[row], answers[row], strict=True)) == wanted
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        asked = [place for place, label in enumerate(labels) if label >= 0]
        assert len(asked) == num_asked
        assert [answer(ids[:place]) for place in asked] == [labels[place] for place in asked]


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(0, 30), st.integers(4, 20), st.sampled_from([True, False]))
def test_copying_asks_for_the_tokens_in_order(seed: int, count: int, more: int, vocab: int, scattered: bool) -> None:
    length, marker = count + more, vocab - 1
    task = selective_copying if scattered else copying
    batch = task(seed, 3, length=length, num_tokens=count, vocab_size=vocab)
    assert batch.input_ids.shape == (3, length + count + 1)

    def answer(read: list[int]) -> int:
        tokens = [token for token in read if token not in (0, marker)]
        assert len(tokens) == count and read[:length].count(0) == more
        return tokens[len(read) - length - 1]

    check_answers(batch, answer, count)
    assert (batch.input_ids[:, length:] == marker).all()
    if not scattered:
        assert (batch.input_ids[:, :count] != 0).all()


def test_selective_copying_scatters_evenly() -> None:
    """Every place is taken as often as any other, within four standard deviations."""
    batch = selective_copying(0, 4000, length=10, num_tokens=3)
    taken = (batch.input_ids[:, :10] != 0).float().mean(0)
    assert (taken - 0.3).abs().max() < 4 * (0.3 * 0.7 / 4000) ** 0.5
    tokens = batch.input_ids[:, :10]
    frequency = torch.bincount(tokens[tokens != 0], minlength=16)
    assert frequency[1:15].min() > 0.8 * 12000 / 14 and frequency[15] == 0


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(3, 40), st.integers(3, 20))
def test_induction_asks_what_followed_the_special_token(seed: int, length: int, vocab: int) -> None:
    batch, special = induction_heads(seed, 4, length=length, vocab_size=vocab), vocab - 1

    def answer(read: list[int]) -> int:
        assert len(read) == length and read[-1] == special and read.count(special) == 2
        return read[read.index(special) + 1]

    check_answers(batch, answer, 1)


def test_the_special_token_stands_anywhere() -> None:
    places = (induction_heads(1, 3000, length=9).input_ids[:, :8] == 15).float().mean(0)
    assert places[7] == 0 and (places[:7] - 1 / 7).abs().max() < 4 * (1 / 7 / 3000) ** 0.5


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(1, 8), st.integers(0, 9))
def test_recall_asks_for_the_value_of_each_key_once(seed: int, pairs: int, more: int) -> None:
    length = 4 * pairs + 2 * more
    batch = associative_recall(seed, 3, length=length, num_pairs=pairs, vocab_size=40)

    def answer(read: list[int]) -> int:
        keys, values = read[: 2 * pairs : 2], read[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs and all(0 < key < 20 for key in keys) and all(20 <= v < 40 for v in values)
        return dict(zip(keys, values, strict=True))[read[-1]]

    check_answers(batch, answer, pairs)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        queried = ids[:-1][labels[1:] >= 0]
        assert sorted(queried.tolist()) == sorted(ids[: 2 * pairs : 2].tolist())


def test_recall_prefers_short_gaps() -> None:
    """p(gap) ~ gap^(power - 1): with one pair the share of each gap is known."""
    batch = associative_recall(3, 6000, length=12, num_pairs=1, vocab_size=64, power=0.01)
    share = (batch.labels[:, 3::2] >= 0).float().mean(0)  # a query stands at 2, 4, .. and its label behind it
    weights = torch.arange(1, 6) ** -0.99
    assert (share - weights / weights.sum()).abs().max() < 0.025


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(6, 60), st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_needle_asks_for_the_hidden_number(seed: int, length: int, depth: float | None) -> None:
    batch = needle(seed, 3, length=length, depth=depth)

    def answer(read: list[int]) -> int:
        text = bytes(read[:length])
        assert text.count(b"#") == 2 and text.endswith(b"#")
        place = text.index(b"#")
        if depth is not None:
            assert place == round(depth * (length - 6))
        assert text[:place].replace(b" ", b"a").islower() or place == 0
        return text[place + 1 + len(read) - length]

    check_answers(batch, answer, 4)
    assert all(bytes(row).isdigit() for row in batch.labels[:, -4:].tolist())


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 3))
def test_phonebook_asks_for_numbers_of_its_names(seed: int, entries: int, queries: int) -> None:
    queries = min(queries, entries)
    batch = phonebook(seed, 3, num_entries=entries, num_queries=queries)
    assert batch.input_ids.shape[1] == 9 * (entries + queries) - 1

    def answer(read: list[int]) -> int:
        *lines, last = bytes(read).decode().split("\n")
        book = dict(line.split(":") for line in lines[:entries])
        assert len(book) == entries and all(len(n) == 3 and n.isalpha() and n.islower() for n in book)
        name, digits = last.split(":")
        return ord(book[name][len(digits)])

    check_answers(batch, answer, 4 * queries)


TASKS: dict[str, Callable[[int], TaskBatch]] = {
    "copying": lambda seed: copying(seed, 4, length=40),
    "selective_copying": lambda seed: selective_copying(seed, 4, length=40),
    "induction_heads": lambda seed: induction_heads(seed, 4, length=40),
    "associative_recall": lambda seed: associative_recall(seed, 4, length=40, num_pairs=5),
    "needle": lambda seed: needle(seed, 4, length=40),
    "phonebook": lambda seed: phonebook(seed, 4, num_entries=5),
}


@pytest.mark.parametrize("name", TASKS)
def test_rows_follow_from_the_seed(name: str) -> None:
    first, again, other = TASKS[name](7), TASKS[name](7), TASKS[name](8)
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert len({tuple(row) for row in first.input_ids.tolist()}) == 4


BAD: dict[str, tuple[Callable[[], TaskBatch], str]] = {
    "no place": (lambda: selective_copying(0, 1, length=3, num_tokens=4), "selective_copying: length 3 has no place"),
    "no token": (lambda: copying(0, 1, length=3, num_tokens=0), "copying: num_tokens must be at least 1"),
    "no vocabulary": (lambda: copying(0, 1, length=3, num_tokens=1, vocab_size=3), "vocab_size must be at least 4"),
    "too short": (lambda: induction_heads(0, 1, length=2), "induction_heads: length must be at least 3"),
    "two kinds": (lambda: induction_heads(0, 1, length=9, vocab_size=2), "vocab_size must be at least 3, got 2"),
    "odd": (lambda: associative_recall(0, 1, length=9, num_pairs=1), "length 9 must be even and 4 num_pairs or more"),
    "crowded": (lambda: associative_recall(0, 1, length=8, num_pairs=3), "length 8 must be even"),
    "few keys": (lambda: associative_recall(0, 1, length=80, num_pairs=9, vocab_size=18), "too few keys"),
    "no pairs": (lambda: associative_recall(0, 1, length=8, num_pairs=0), "num_pairs must be at least 1"),
    "no hay": (lambda: needle(0, 1, length=5), "needle: length must be above 5, got 5"),
    "deep": (lambda: needle(0, 1, length=9, depth=1.5), "needle: depth must be 0 to 1, got 1.5"),
    "no book": (lambda: phonebook(0, 1, num_entries=0), "phonebook: num_entries must be 1 to 17576"),
    "not asked": (lambda: phonebook(0, 1, num_entries=2, num_queries=3), "num_queries must be 1 to num_entries"),
}


@pytest.mark.parametrize("name", BAD)
def test_sizes_that_cannot_work_get_one_line(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
