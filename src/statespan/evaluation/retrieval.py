"""Needle in a haystack and phonebook, in bytes: a number that was said once, somewhere in a long text."""

import torch
from torch import Generator, Tensor

from statespan.evaluation.batch import NOT_ASKED, TaskBatch, distinct, generator, require

VOCAB_SIZE = 128  # ASCII
NUM_DIGITS = 4
NAME_LENGTH = 3
ENTRY_LENGTH = NAME_LENGTH + NUM_DIGITS + 2  # "abc:1234\n"
NEEDLE_LENGTH = NUM_DIGITS + 1  # "#1234"


def needle(
    seed: int,
    batch_size: int,
    *,
    length: int,
    depth: float | None = None,
    device: torch.device | str = "cpu",
) -> TaskBatch:
    """A number "#1234" in a text of random small letters and spaces; the text ends with "#", and the number is asked.

    Args:
        seed: of the batch; the same seed and device give the same rows.
        batch_size: rows.
        length: bytes of the text with its last "#", at least 6.
        depth: where the number stands, 0 at the beginning to 1 at the end; None: anywhere, row by row.
        device: where the rows are made.
    Returns:
        Rows of length + 4: the text, and the four digits, each asked.
    Raises:
        UserError: a text too short, or a depth outside 0 to 1.

    Example:
        >>> batch = needle(0, 1, length=12, depth=0.0)
        >>> bytes(batch.input_ids[0, :5].tolist())[:1], bytes(batch.input_ids[0, 11:12].tolist())
        (b'#', b'#')
    """
    require(length > NEEDLE_LENGTH, "needle", f"length must be above {NEEDLE_LENGTH}, got {length}")
    require(depth is None or 0 <= depth <= 1, "needle", f"depth must be 0 to 1, got {depth}")
    random = generator(seed, device)
    input_ids = _letters(random, (batch_size, length + NUM_DIGITS))
    spaces = torch.rand(batch_size, length, generator=random, device=device) < 1 / 6
    input_ids[:, :length].masked_fill_(spaces, ord(" "))
    room = length - 1 - NEEDLE_LENGTH
    if depth is None:
        place = torch.randint(0, room + 1, (batch_size, 1), generator=random, device=device)
    else:
        place = torch.full((batch_size, 1), round(depth * room), device=device)
    digits = _digits(random, (batch_size, NUM_DIGITS))
    sign = torch.full((batch_size, 1), ord("#"), device=device)
    input_ids.scatter_(1, place + torch.arange(NEEDLE_LENGTH, device=device), torch.cat([sign, digits], dim=1))
    input_ids[:, length - 1] = ord("#")
    input_ids[:, length:] = digits
    return TaskBatch(input_ids, _last_asked(input_ids, NUM_DIGITS), NUM_DIGITS)


def phonebook(
    seed: int, batch_size: int, *, num_entries: int, num_queries: int = 1, device: torch.device | str = "cpu"
) -> TaskBatch:
    """Lines "abc:1234" with names that differ, then some of the names again: their numbers are asked.

    Args:
        seed: of the batch; the same seed and device give the same rows.
        batch_size: rows.
        num_entries: lines of the book, 1 to 17,576.
        num_queries: different names asked, one line each; at most num_entries. Training learns faster from several.
        device: where the rows are made.
    Returns:
        Rows of 9 (num_entries + num_queries) - 1 bytes; the digits of the queries are asked.
    Raises:
        UserError: numbers out of range.
    """
    task, names_there_are = "phonebook", 26**NAME_LENGTH
    require(1 <= num_entries <= names_there_are, task, f"num_entries must be 1 to {names_there_are}, got {num_entries}")
    require(1 <= num_queries <= num_entries, task, f"num_queries must be 1 to num_entries, got {num_queries}")
    random = generator(seed, device)
    names = distinct(random, batch_size, num_entries, names_there_are)
    powers = 26 ** torch.arange(NAME_LENGTH, device=device)
    letters = ord("a") + names.unsqueeze(-1) // powers % 26
    numbers = _digits(random, (batch_size, num_entries, NUM_DIGITS))
    ends = letters.new_full((batch_size, num_entries, 1), ord(":")), letters.new_full(letters[..., :1].shape, ord("\n"))
    lines = torch.cat([letters, ends[0], numbers, ends[1]], dim=-1)
    asked = distinct(random, batch_size, num_queries, num_entries)
    queries = lines.gather(1, asked.unsqueeze(-1).expand(-1, -1, ENTRY_LENGTH))
    input_ids = torch.cat([lines, queries], dim=1).flatten(1)[:, :-1]
    labels = torch.full_like(lines, NOT_ASKED)
    answers = torch.full_like(queries, NOT_ASKED)
    answers[..., NAME_LENGTH + 1 : -1] = queries[..., NAME_LENGTH + 1 : -1]
    labels = torch.cat([labels, answers], dim=1).flatten(1)[:, :-1]
    return TaskBatch(input_ids, labels, NUM_DIGITS * num_queries)


def _letters(random: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(ord("a"), ord("z") + 1, shape, generator=random, device=random.device)


def _digits(random: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(ord("0"), ord("9") + 1, shape, generator=random, device=random.device)


def _last_asked(input_ids: Tensor, count: int) -> Tensor:
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, -count:] = input_ids[:, -count:]
    return labels
