"""PagePool: whatever is taken and given back, each page is free or has its holders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statespan.serving.page_pool import OutOfPages, PagePool


@given(st.integers(2, 12), st.lists(st.tuples(st.sampled_from("arh"), st.integers(0, 9)), max_size=60))
def test_pages_are_conserved(num_pages: int, program: list[tuple[str, int]]) -> None:
    pool, held = PagePool(num_pages), []
    for kind, number in program:
        if kind == "a":
            if number > pool.num_free:
                with pytest.raises(OutOfPages):
                    pool.allocate(number)
            else:
                held.append(pool.allocate(number))
        elif held and kind == "r":
            pool.release(held.pop(number % len(held)))
        elif held:
            pages = held[number % len(held)]
            pool.retain(pages)
            held.append(pages)
        counts = [sum(pages.count(page) for pages in held) for page in range(num_pages)]
        assert [pool.holders(page) for page in range(num_pages)] == counts
        assert counts[0] == 0
        assert pool.num_free == counts[1:].count(0)


def test_a_page_that_is_free_has_no_holder_to_lose() -> None:
    pool = PagePool(3)
    pages = pool.allocate(1)
    pool.release(pages)
    for use in (pool.release, pool.retain):
        with pytest.raises(AssertionError, match="is free"):
            use(pages)


def test_too_many_is_one_line_and_takes_nothing() -> None:
    pool = PagePool(4)
    with pytest.raises(OutOfPages, match=r"^4 pages are wanted and 3 of 3 are free$"):
        pool.allocate(4)
    assert pool.num_free == 3
