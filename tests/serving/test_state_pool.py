"""StatePool under random programs: every row knows exactly its own tokens, and pages are conserved."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.serving.page_pool import OutOfPages
from statespan.serving.runner import Chunk, Runner
from statespan.serving.snapshot import Snapshot
from statespan.serving.state_pool import StatePool

ROWS, PAGES, PAGE_SIZE, LONGEST = 5, 40, 4, 30
TOLERANCE = 2e-5 if torch.cuda.is_available() else 1e-5
NAMES = ("prefill", "prefill", "decode", "decode", "fork", "move", "clear", "snapshot", "restore", "host", "drop")
ACTIONS = st.tuples(
    st.sampled_from(NAMES),
    st.lists(st.integers(0, 99), min_size=6, max_size=6),
)


@dataclass
class Program:
    """A pool, and beside it what each row and snapshot should know."""

    model: LanguageModel
    rows: list[list[int]] = field(default_factory=lambda: [[] for _ in range(ROWS)])
    kept: list[tuple[list[int], Snapshot]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = StatePool(self.model, ROWS, PAGES, PAGE_SIZE)
        poison(self.pool)
        self.runner = Runner(self.model, self.pool)

    def run(self, action: str, numbers: list[int]) -> None:
        used = [row for row in range(ROWS) if self.rows[row]]
        free = [row for row in range(ROWS) if not self.rows[row]]
        pick = lambda among: among[numbers[0] % len(among)]  # noqa: E731  # of rows or snapshots
        if action == "prefill":
            self.prefill(numbers)
        elif action == "decode":
            self.decode(numbers)
        elif action in ("fork", "move") and used and free:
            source, target = pick(used), free[numbers[1] % len(free)]
            getattr(self.pool, action)(source, target)
            self.rows[target] = list(self.rows[source])
            if action == "move":
                self.rows[source] = []
        elif action == "clear" and used:
            self.pool.clear(row := pick(used))
            self.rows[row] = []
        elif action == "snapshot":
            row = numbers[0] % ROWS
            self.kept.append((list(self.rows[row]), self.pool.snapshot(row)))
        elif action == "restore" and self.kept and free:
            tokens, snapshot = pick(self.kept)
            self.pool.restore(row := free[numbers[1] % len(free)], snapshot)
            self.rows[row] = list(tokens)
        elif action == "host" and self.kept:
            tokens, snapshot = pick(self.kept)
            stored = self.pool.to_host(snapshot)
            self.kept.append((tokens, self.pool.from_host(len(tokens), stored)))
        elif action == "drop" and self.kept:
            self.pool.release(self.kept.pop(numbers[0] % len(self.kept))[1])

    def prefill(self, numbers: list[int]) -> None:
        """Chunks of unequal length to some of the rows, in any order."""
        chunks = []
        for place in range(1 + numbers[0] % ROWS):
            row, count = (numbers[1] + 2 * place) % ROWS, 1 + numbers[(2 + place) % 6] % 11
            count = min(count, LONGEST - len(self.rows[row]))
            if count > 0:
                chunks.append(Chunk(row, tuple((numbers[3] + 7 * place + t * t) % 61 for t in range(count))))
        if chunks:
            logits = self.runner.prefill(chunks)
            for chunk in chunks:
                self.rows[chunk.row] += chunk.token_ids
            self.expect([chunk.row for chunk in chunks], logits)

    def decode(self, numbers: list[int]) -> None:
        """A token to the first rows; the others, which may be in the midst of their prompts, stay as they are."""
        count = 1 + numbers[0] % ROWS
        if max(len(tokens) for tokens in self.rows[:count]) < LONGEST:
            tokens = [(numbers[1] + 5 * row) % 61 for row in range(count)]
            for row in range(count):
                self.pool.reserve(row, len(self.rows[row]) + 1)
            logits = self.runner.decode(tokens)
            for row, token in enumerate(tokens):
                self.rows[row].append(token)
            self.expect(range(count), logits)

    def expect(self, rows, logits: torch.Tensor) -> None:
        for row, found in zip(rows, logits, strict=True):
            tokens = torch.tensor([self.rows[row]], device=found.device)
            with torch.inference_mode():
                torch.testing.assert_close(found, self.model(tokens).logits[0, -1], rtol=0, atol=TOLERANCE)

    def check(self) -> None:
        """Counts of holders are those of rows and snapshots; nobody but their filler writes to shared pages."""
        pool = self.pool
        assert pool.num_tokens == [len(tokens) for tokens in self.rows]
        held = [pool.pages_of(row) for row in range(ROWS)]
        everybody = [page for pages in (*held, *(snapshot.pages for _, snapshot in self.kept)) for page in pages]
        assert [pool.pages.holders(page) for page in range(PAGES)] == [everybody.count(page) for page in range(PAGES)]
        gone = [pool.pages_for(count) - pool.pages_seen(count) for count in pool.num_tokens]
        num_full = [max(0, count // PAGE_SIZE - first) for count, first in zip(pool.num_tokens, gone, strict=True)]
        writable = [page for row in range(ROWS) for page in held[row][num_full[row] :]]
        assert len(set(writable)) == len(writable)
        full = {page for row in range(ROWS) for page in held[row][: num_full[row]]}
        assert not full & set(writable)


def poison(pool: StatePool) -> None:
    """What nobody wrote must reach nobody."""
    pool._memory.kv.fill_(torch.nan)
    for tensor in pool._slabs.tensors:
        tensor.fill_(torch.nan)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(program=st.lists(ACTIONS, min_size=5, max_size=14))
def test_rows_equal_forward_from_scratch(family: LanguageModel, program: list[tuple[str, list[int]]]) -> None:
    torch.manual_seed(0)
    run = Program(family)
    for action, numbers in program:
        try:
            run.run(action, numbers)
        except OutOfPages:
            break
        run.check()
    for row in range(ROWS):
        run.pool.clear(row)
    for _, snapshot in run.kept:
        run.pool.release(snapshot)
    assert run.pool.pages.num_free == PAGES - 1


def test_pages_behind_a_window_are_let_go(family: LanguageModel) -> None:
    """A window of 7 tokens: after 29 tokens the next one sees slots 23 to 28, on pages 5, 6 and 7."""
    window = family.config.attention.sliding_window
    pool = StatePool(family, 3, 60, PAGE_SIZE)
    if not pool.pages_for(1):
        return
    poison(pool)
    runner = Runner(family, pool)
    tokens = [5 * i % 61 for i in range(60)]
    runner.prefill([Chunk(0, tuple(tokens[:29]))])
    held = 3 if window else 8
    assert len(pool.pages_of(0)) == pool.pages_seen(29) == held and pool.pages.num_free == 59 - held
    snapshot = pool.snapshot(0)
    assert len(snapshot.pages) == held
    pool.move(0, 1)
    pool.fork(1, 0)
    assert pool.pages.num_free == 59 - held - 1  # the last page, which is copied
    pool.reserve(0, 60)
    for token in tokens[29:59]:
        runner.decode([token])
    assert len(pool.pages_of(0)) == (pool.pages_seen(59) if window else 15)
    logits = runner.decode(tokens[59:])
    with torch.inference_mode():
        expected = family(torch.tensor([tokens], device=family.device)).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    pool.clear(0)
    pool.clear(1)
    assert pool.pages.num_free == 59 - held
    pool.release(snapshot)
    assert pool.pages.num_free == 59


def test_bytes_are_those_of_the_tensors(hybrid: LanguageModel) -> None:
    pool = StatePool(hybrid, 3, 9, 4)
    item = hybrid.embedding.weight.element_size()
    assert pool.page_bytes == 2 * 2 * 4 * (2 * 8) * item  # layers, keys and values, tokens, kv heads, bytes
    row = hybrid.new_state(1)
    constant = sum(layer.num_bytes for layer in row.layers if layer is not None and not hasattr(layer, "length"))
    assert pool.row_bytes == constant
    Runner(hybrid, pool).prefill([Chunk(1, (1, 2, 3, 4, 5))])
    snapshot = pool.snapshot(1)
    assert len(snapshot.pages) == 2
    assert snapshot.num_bytes == constant + 2 * pool.page_bytes
    stored = pool.to_host(snapshot)
    assert sum(tensor.nbytes for tensor in stored.values()) == snapshot.num_bytes


def test_a_snapshot_stays_as_it_is_while_its_row_goes_on(hybrid: LanguageModel) -> None:
    pool = StatePool(hybrid, 2, 20, 4)
    runner = Runner(hybrid, pool)
    runner.prefill([Chunk(0, (3, 1, 4, 1, 5, 9))])
    snapshot = pool.snapshot(0)
    first = runner.prefill([Chunk(0, (2, 6, 5))])
    pool.clear(0)
    pool.restore(1, snapshot)
    assert pool.pages_of(1)[0] == snapshot.pages[0], "the full page is shared"
    assert pool.pages_of(1)[1] != snapshot.pages[1], "the partly filled one is copied"
    again = runner.prefill([Chunk(1, (2, 6, 5))])
    torch.testing.assert_close(again, first)


def test_forward_commits_nothing_until_it_is_stored(hybrid: LanguageModel) -> None:
    """So that several tokens can be tried and taken back."""
    pool = StatePool(hybrid, 2, 20, 4)
    runner = Runner(hybrid, pool)
    runner.prefill([Chunk(0, (3, 1, 4)), Chunk(1, (2, 7))])
    for row in (0, 1):
        pool.reserve(row, 12)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], device=hybrid.device)
    with torch.inference_mode():
        tried = hybrid(tokens + 7, state=pool.state([0, 1])).logits
        output = hybrid(tokens, state=pool.state([0, 1]))
    assert (tried - output.logits).abs().max() > 0.01
    pool.store([0, 1], output.state, [3, 3])
    assert pool.num_tokens == [6, 5]
    with torch.inference_mode():
        whole = hybrid(torch.tensor([[2, 7, 4, 5, 6, 8]], device=hybrid.device)).logits[0, -1]
    torch.testing.assert_close(runner.decode([9, 8])[1], whole, rtol=0, atol=TOLERANCE)


def test_a_snapshot_of_another_model_is_one_line(hybrid: LanguageModel) -> None:
    pool = StatePool(hybrid, 1, 9, 4)
    Runner(hybrid, pool).prefill([Chunk(0, (1, 2, 3, 4, 5))])
    stored = pool.to_host(pool.snapshot(0))
    free = pool.pages.num_free
    for change, message in (
        ({"pages": stored["pages"][:, :1]}, r"pages of a snapshot are \[4, 1, 4, 2, 8\] .* and here \[4, 2, 4, 2, 8\]"),
        ({"state.0": stored["state.0"][:1, :1]}, "state 0 of a snapshot is"),
        ({"state.0": stored["state.0"].double()}, "torch.float64, and this model's"),
    ):
        with pytest.raises(UserError, match=message):
            pool.from_host(5, stored | change)
    del stored["state.1"]
    with pytest.raises(UserError, match=r"a snapshot without state\.1 is not of this model"):
        pool.from_host(5, stored)
    assert pool.pages.num_free == free


def test_too_few_pages_change_nothing(hybrid: LanguageModel) -> None:
    pool = StatePool(hybrid, 2, 4, 4)
    runner = Runner(hybrid, pool)
    runner.prefill([Chunk(0, tuple(range(10)))])
    for use in (lambda: pool.reserve(0, 13), lambda: pool.fork(0, 1), lambda: runner.prefill([Chunk(1, (1,))])):
        with pytest.raises(OutOfPages, match="1 pages are wanted and 0 of 3 are free"):
            use()
    assert pool.num_tokens == [10, 0]
    assert pool.pages_of(1) == ()
    with pytest.raises(UserError, match="a pool needs rows and pages"):
        StatePool(hybrid, 0, 4, 4)
