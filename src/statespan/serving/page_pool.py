"""PagePool: which pages of keys and values are free, and how many hold each of the others. No tensors."""

from collections.abc import Callable, Iterable

from statespan.errors import UserError


class OutOfPages(UserError):
    """More pages were asked for than are free."""


class PagePool:
    """Counts the holders of pages 1 to num_pages - 1; page 0 is nobody's.

    Example:
        >>> pool = PagePool(4)
        >>> pages = pool.allocate(2)
        >>> pool.retain(pages[:1])
        >>> pool.release(pages)
        >>> pages, pool.num_free, pool.holders(pages[0])
        ([1, 2], 2, 1)
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.reclaim: Callable[[int], object] | None = None  # makes so many free, if it can, of those that can wait
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # the next one is the last

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page; 0: it is free."""
        return self._holders[page]

    def allocate(self, count: int) -> list[int]:
        """Free pages, each with one holder now.

        Raises:
            OutOfPages: fewer are free; nothing was taken.
        """
        if count > self.num_free and self.reclaim is not None:
            self.reclaim(count)
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are wanted and {self.num_free} of {self.num_pages - 1} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One holder more for each of these pages, which are not free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each; pages without holders are free."""
        for page in reversed(list(pages)):  # so that they come back in order
            assert self._holders[page] > 0, f"page {page} is free"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
