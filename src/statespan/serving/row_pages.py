"""RowPages: which pages of keys and values each row of a pool holds, here and as a table on the device."""

from collections.abc import Sequence

import torch

from statespan.models.transfer import to_device
from statespan.serving.page_pool import PagePool


class RowPages:
    """Rows of so many tokens each, and pages for at least these, but for those that a sliding window has left behind.

    A page may have several holders, and then nobody writes to it, but for the row that filled it.

    Args:
        pages: where they come from.
        page_size: tokens of a page; 0: rows have tokens and no pages.
        num_rows: sequences.
        padded_rows: of the table on the device.
        window: tokens that a new one sees, itself included; None: all.
        device: where the table is.
    """

    def __init__(
        self, pages: PagePool, page_size: int, num_rows: int, padded_rows: int, window: int | None, device: torch.device
    ) -> None:
        self.pages, self.window, self._page_size, self._device = pages, window, page_size, device
        self.num_tokens = [0] * num_rows
        self.held: list[list[int]] = [[] for _ in range(num_rows)]  # in order; 0 where a page was let go
        self.num_gone = [0] * num_rows  # so many at the beginning
        most = pages.num_pages - 1 if page_size else 0
        self.table = torch.zeros(padded_rows, most, dtype=torch.int32, device=device)
        self.length = torch.zeros(padded_rows, dtype=torch.int32, device=device)

    def needed(self, num_tokens: int) -> int:
        """Pages of a row with so many tokens, those that a window has left behind included."""
        return -(-num_tokens // self._page_size) if self._page_size else 0

    def full(self, num_tokens: int) -> int:
        """Pages that so many tokens fill."""
        return num_tokens // self._page_size if self._page_size else 0

    def gone(self, num_tokens: int) -> int:
        """Pages at the beginning of a sequence that its sliding window has left behind."""
        return 0 if self.window is None else max(0, num_tokens - self.window + 1) // self._page_size

    def most(self, num_tokens: int, at_once: int) -> int:
        """Pages that a row holds at most on its way to so many tokens, of which a forward takes up to `at_once`."""
        needed = self.needed(num_tokens)
        return needed if self.window is None else min(needed, self.needed(self.window + at_once) + 1)

    def of(self, row: int) -> list[int]:
        """The pages that a row holds, in order."""
        return self.held[row][self.num_gone[row] :]

    def seen_by(self, row: int) -> list[int]:
        """Those with tokens that the row's next one sees."""
        num_tokens = self.num_tokens[row]
        return self.held[row][self.gone(num_tokens) : self.needed(num_tokens)]

    def reserve(self, row: int, num_tokens: int) -> None:
        """Give the row pages for so many tokens in all, those that it has included.

        Raises:
            OutOfPages: fewer are free; nothing was taken.
        """
        held = self.held[row]
        wanted = self.needed(num_tokens) - len(held)
        if wanted > 0:
            held += self.pages.allocate(wanted)
            self._write_table(row, len(held) - wanted)

    def extend(self, count: int) -> None:
        """Give the first rows, which have a window, pages for a token more each."""
        rows = [row for row in range(count) if self.needed(self.num_tokens[row] + 1) > len(self.held[row])]
        if rows:
            new = self.pages.allocate(len(rows))
            entries = torch.tensor([rows, [len(self.held[row]) for row in rows], new])
            of_row, place, page = to_device(entries, torch.int64, self._device)
            self.table[of_row, place] = page.int()
            for row, number in zip(rows, new, strict=True):
                self.held[row].append(number)

    def add(self, row: int, count: int) -> None:
        """The row has so many tokens more; pages that no later token of it sees are free."""
        self.num_tokens[row] += count
        assert self.needed(self.num_tokens[row]) <= len(self.held[row]), f"row {row} outgrew its pages"
        known, gone = self.num_gone[row], self.gone(self.num_tokens[row])
        if gone > known:
            self.pages.release(self.held[row][known:gone])
            self.held[row][known:gone] = [0] * (gone - known)
            self.num_gone[row] = gone

    def tell_lengths(self, rows: Sequence[int]) -> None:
        """The device needs them for keys and values alone."""
        if self._page_size:
            new = to_device([self.num_tokens[row] for row in rows], torch.int32, self._device)
            self.length[to_device(rows, torch.int64, self._device)] = new

    def clear(self, row: int) -> None:
        """The row has nothing."""
        self.pages.release(self.of(row))
        self.held[row], self.num_gone[row] = [], 0
        self.table[row] = 0
        self.set_length(row, 0)

    def move(self, source: int, target: int) -> None:
        """What one row has is another's."""
        self.held[target], self.held[source] = self.held[source], []
        self.num_gone[target], self.num_gone[source] = self.num_gone[source], 0
        self.table[target] = self.table[source]
        self.set_length(target, self.num_tokens[source])
        self.clear(source)

    def share(self, row: int, num_tokens: int, pages: Sequence[int]) -> list[tuple[int, int]]:
        """Give a free row the full ones of the pages that it sees after so many tokens, and a new one for the last.

        Returns:
            What is to be copied: from and to which page.

        Raises:
            OutOfPages: no page is free for that copy; nothing was changed.
        """
        gone = self.gone(num_tokens)
        full = self.full(num_tokens) - gone
        copy = self.pages.allocate(len(pages) - full)
        self.pages.retain(pages[:full])
        self.held[row], self.num_gone[row] = [0] * gone + [*pages[:full], *copy], gone
        self._write_table(row)
        self.set_length(row, num_tokens)
        return list(zip(pages[full:], copy, strict=True))

    def run(self, row: int) -> int | None:
        """The first page, if each of the others follows the one before; those that were let go may be any."""
        held, num_gone = self.of(row), self.num_gone[row]
        if not held or held[0] < num_gone or held != list(range(held[0], held[0] + len(held))):
            return None
        return held[0] - num_gone

    def _write_table(self, row: int, first: int = 0) -> None:
        """Tell the device of a row's pages from the first one on."""
        pages = self.held[row][first:]
        self.table[row, first : first + len(pages)] = to_device(pages, torch.int32, self._device)

    def set_length(self, row: int, num_tokens: int) -> None:
        """Here and on the device."""
        self.num_tokens[row] = num_tokens
        self.length[row].fill_(num_tokens)  # an assignment of one number waits for the device
