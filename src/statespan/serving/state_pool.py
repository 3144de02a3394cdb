"""StatePool: the memory of the sequences that are served: constant states in rows, keys and values in pages."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.kv_cache import PagedKVCache
from statespan.layers.state import ModelState, State
from statespan.models.language_model import LanguageModel
from statespan.models.slabs import Slabs, states_in
from statespan.models.transfer import to_device
from statespan.serving.page_pool import PagePool
from statespan.serving.pool_memory import PoolMemory, padded_rows
from statespan.serving.row_pages import RowPages
from statespan.serving.snapshot import Mark, Snapshot


class StatePool:
    """Rows for sequences of one model.

    A row has a constant state, `num_tokens[row]` tokens, and pages for at least so many, but for those that a sliding
    window has left behind. A page may have several holders, and then nobody writes to it, but for the row that filled
    it: it goes on behind what snapshots of it know.

    Args:
        model: whose states they are.
        num_rows: sequences.
        num_pages: of keys and values, page 0, which is nobody's, included.
        page_size: tokens of a page.
        rewinds: rows may be set back, so that no page is let go before a row is free.
    """

    def __init__(
        self, model: LanguageModel, num_rows: int, num_pages: int, page_size: int, *, rewinds: bool = False
    ) -> None:
        if num_rows < 1 or num_pages < 1 or page_size < 1:
            raise UserError(f"a pool needs rows and pages, got {num_rows} rows, {num_pages} pages of {page_size}")
        self.num_rows, self.page_size = num_rows, page_size
        self.pages = PagePool(num_pages)
        self.device = model.device
        self._memory = PoolMemory(model, padded_rows(num_rows, self.device), num_pages, page_size)
        self._slabs, rows = self._memory.slabs, self._memory.slabs.num_rows
        self.page_bytes = self._memory.page_bytes  # of all layers
        attends = self._memory.has_pages
        window = model.config.attention.sliding_window if attends and not rewinds else None
        self.row_pages = RowPages(self.pages, page_size if attends else 0, num_rows, rows, window, self.device)
        self.num_tokens = self.row_pages.num_tokens
        self.active = torch.zeros(rows, dtype=torch.int32, device=self.device)  # 1: the row takes part in decoding
        self._layers = self._memory.layers(self.row_pages.table, self.row_pages.length)

    @property
    def num_bytes(self) -> int:
        """Of all rows and pages."""
        rows = (self.row_pages.table, self.row_pages.length, self.active)
        return self._memory.num_bytes + sum(tensor.nbytes for tensor in rows)

    @property
    def row_bytes(self) -> int:
        """Of one row's constant states."""
        return self._slabs.num_bytes // self._slabs.num_rows

    def pages_for(self, num_tokens: int) -> int:
        """Pages of a row with so many tokens; 0 where no layer has keys and values."""
        return self.row_pages.needed(num_tokens)

    def pages_seen(self, num_tokens: int) -> int:
        """As `pages_for`, without those that no token after these sees."""
        return self.row_pages.needed(num_tokens) - self.row_pages.gone(num_tokens)

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages that a row holds, in order."""
        return tuple(self.row_pages.of(row))

    @property
    def slides(self) -> bool:
        """Whether rows let go of pages on their way, and so get them on their way too."""
        return self.row_pages.window is not None

    def most_pages(self, num_tokens: int, at_once: int) -> int:
        """Pages that a row holds at most on its way to so many tokens, of which a forward takes up to `at_once`."""
        return self.row_pages.most(num_tokens, at_once)

    def reserve(self, row: int, num_tokens: int) -> None:
        """Give the row pages for so many tokens in all, those that it has included.

        Raises:
            OutOfPages: fewer are free; nothing was taken.
        """
        self.row_pages.reserve(row, num_tokens)

    @torch.inference_mode()
    def state(self, rows: Sequence[int]) -> ModelState:
        """What forward takes: copies of the rows' constant states, and their pages, in which it writes new tokens.

        Those are nobody's until `store`: forward may be called again from here.
        """
        lengths = [self.num_tokens[row] for row in rows]
        fresh = [place for place, length in enumerate(lengths) if length == 0]
        constants = self._slabs.read(rows, fresh)
        index = to_device(rows, torch.int64, self.device)
        table = self.row_pages.table[index, : max(len(self.row_pages.held[row]) for row in rows)]
        length = self.row_pages.length[index]
        dense = len(set(lengths)) == 1
        first = self.row_pages.run(rows[0]) if len(rows) == 1 else None
        layers: list[State | None] = []
        for layer, constant in zip(self._layers, constants, strict=True):
            if isinstance(layer, PagedKVCache):
                layer = replace(layer, table=table, length=length, longest=max(lengths), dense=dense, first_page=first)
            layers.append(None if layer is None else replace(layer, **constant))  # type: ignore[type-var]  # a dataclass
        return ModelState(tuple(layers))

    @torch.inference_mode()
    def store(self, rows: Sequence[int], state: ModelState, added: Sequence[int]) -> None:
        """Take back what forward returned for `state(rows)` and so many new tokens of each row."""
        self._slabs.write(rows, state.layers)
        self.grow(rows, added)

    @torch.inference_mode()
    def grow(self, rows: Sequence[int], added: Sequence[int]) -> None:
        """So many new tokens are in each row's memory."""
        for row, count in zip(rows, added, strict=True):
            self.row_pages.add(row, count)
        self.row_pages.tell_lengths(rows)

    def slabs(self, count: int) -> Slabs:
        """Memory for `count` constant states."""
        return self._memory.new_slabs(count)

    def state_in(self, slabs: Slabs, count: int) -> ModelState:
        """The first `count` constant states of such memory, by layer; without keys and values."""
        return states_in(slabs, self._layers, count)

    @torch.inference_mode()
    def take(self, rows: Sequence[int], slabs: Slabs, sources: Sequence[int], added: Sequence[int]) -> None:
        """Rows go on from these constant states, by so many tokens, whose keys and values are in their pages."""
        self._slabs.take_rows(rows, slabs, sources)
        self.grow(rows, added)

    def copy_to(self, slabs: Slabs, first: int, count: int) -> None:
        """The constant states of the first `count` rows, to such memory, from a row on."""
        self._slabs.copy_to(slabs, first, count)

    @torch.inference_mode()
    def zero_fresh(self, count: int) -> None:
        """Those of the first rows that have no tokens are as before the first one; before, they may hold anything."""
        for row in range(count):
            if self.num_tokens[row] == 0:
                self._slabs.zero(row)

    @torch.inference_mode()
    def mark(self, count: int) -> Mark:
        """How the first rows are now, for `rewind`."""
        return Mark(self._slabs.leading(count), tuple(self.num_tokens[:count]))

    @torch.inference_mode()
    def rewind(self, rows: Sequence[int], marks: Sequence[Mark]) -> None:
        """Set each row of a pool that `rewinds` back to its mark; what it appended since then is nobody's."""
        for mark in dict.fromkeys(marks):
            its = [row for row, one in zip(rows, marks, strict=True) if one is mark]
            index = to_device(its, torch.int64, self.device)
            self._slabs.scatter(its, [tensor.index_select(1, index) for tensor in mark.tensors])
            for row in its:
                self.num_tokens[row] = mark.num_tokens[row]
        self.row_pages.tell_lengths(rows)

    def leading(self, count: int) -> ModelState:
        """The memory of the first rows itself, for a decoder that overwrites it: see `advance`."""
        layers = [None if layer is None else layer.map(lambda tensor: tensor[:count]) for layer in self._layers]
        return ModelState(tuple(layers))

    @contextmanager
    def untouched(self, rows: Sequence[int]) -> Generator[None, None, None]:
        """Inside, a step may overwrite the constant states of these rows."""
        kept = self._slabs.gather(rows) if rows else []
        yield
        if rows:
            self._slabs.scatter(rows, kept)

    def advance(self, count: int) -> None:
        """A decoder takes the first rows on by a token each; the device counts for itself."""
        self.zero_fresh(count)
        if self.slides:
            self.row_pages.extend(count)
        for row in range(count):
            self.row_pages.add(row, 1)

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """The row is free, and as before the first token."""
        self.row_pages.clear(row)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """What one row has is another's, which was free; the first is free then."""
        self._require_free(target)
        self._slabs.copy(source, target)
        self.row_pages.move(source, target)

    @torch.inference_mode()
    def fork(self, source: int, target: int) -> None:
        """A free row goes on from where another is; full pages are shared, a partly filled one is copied.

        Raises:
            OutOfPages: no page is free for that copy; nothing was changed.
        """
        self._require_free(target)
        self._share(target, self.num_tokens[source], self.row_pages.seen_by(source))
        self._slabs.copy(source, target)

    @torch.inference_mode()
    def snapshot(self, row: int) -> Snapshot:
        """The row as it is; to be given back by `release`."""
        num_tokens = self.num_tokens[row]
        pages = tuple(self.row_pages.seen_by(row))
        self.pages.retain(pages)
        return Snapshot(num_tokens, self._slabs.take(row, fresh=num_tokens == 0), pages, self.page_bytes)

    @torch.inference_mode()
    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Set a free row to a snapshot, which stays as it is.

        Raises:
            OutOfPages: no page is free for a copy of its partly filled one; nothing was changed.
        """
        self._require_free(row)
        self._share(row, snapshot.num_tokens, snapshot.pages)
        self._slabs.put(row, snapshot.tensors)

    def release(self, snapshot: Snapshot) -> None:
        """A snapshot ends: its pages lose a holder."""
        self.pages.release(snapshot.pages)

    @torch.inference_mode()
    def to_host(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Copies in CPU memory of all that a snapshot holds, for `from_host`."""
        tensors = {f"state.{number}": tensor.cpu() for number, tensor in enumerate(snapshot.tensors)}
        return tensors | {"pages": self._memory.to_host(snapshot.pages)}

    @torch.inference_mode()
    def from_host(self, num_tokens: int, tensors: Mapping[str, Tensor]) -> Snapshot:
        """A snapshot again, in pages of its own.

        Raises:
            UserError: a tensor is missing, or is not of this model and page size.
            OutOfPages: too few pages are free.
        """
        names = [f"state.{number}" for number in range(len(self._slabs))]
        missing = [name for name in (*names, "pages") if name not in tensors]
        if missing:
            raise UserError(f"a snapshot without {', '.join(missing)} is not of this model")
        self._slabs.check([tensors[name] for name in names])
        count = self.pages_seen(num_tokens)
        self._memory.check_pages(tensors["pages"], count)
        pages = self.pages.allocate(count)
        self._memory.from_host(pages, tensors["pages"])
        states = tuple(tensors[name].to(self.device) for name in names)
        return Snapshot(num_tokens, states, tuple(pages), self.page_bytes)

    def _share(self, row: int, num_tokens: int, pages: Sequence[int]) -> None:
        for page, copy in self.row_pages.share(row, num_tokens, pages):
            self._memory.copy_page(page, copy)

    def _require_free(self, row: int) -> None:
        assert not self.num_tokens[row] and not self.row_pages.held[row], f"row {row} is in use"
