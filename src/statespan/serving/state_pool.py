"""StatePool: the memory of the sequences that are served: constant states in rows, keys and values in pages."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.layers.state import KVCache, ModelState, PagedKVCache, State
from statespan.models.language_model import LanguageModel
from statespan.models.slabs import Slabs, states_in
from statespan.models.transfer import to_device
from statespan.serving.page_pool import PagePool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A row at one moment: copies of its constant states, and its pages, which the snapshot holds too.

    Pages that a sliding window has left behind are not among them.
    """

    num_tokens: int
    tensors: tuple[Tensor, ...]  # one a slab of the pool: [layers ...]
    pages: tuple[int, ...]
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of both; pages are counted whole, also where others hold them."""
        return sum(tensor.nbytes for tensor in self.tensors) + len(self.pages) * self.page_bytes


@dataclass(frozen=True, eq=False)
class Mark:
    """The first rows of a pool at one moment: copies of their constant states, and how many tokens they had."""

    tensors: Sequence[Tensor]  # one a slab of the pool: [layers rows ...]
    num_tokens: tuple[int, ...]


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
        self.num_tokens = [0] * num_rows
        self._held: list[list[int]] = [[] for _ in range(num_rows)]  # in order; 0 where a page was let go
        self._num_gone = [0] * num_rows  # so many at the beginning
        states = model.new_state(0).layers
        caches = [state for state in states if isinstance(state, KVCache)]
        self._window = None if rewinds or not caches else model.config.attention.sliding_window
        self.device = model.device
        self._constants = [_constant(state) for state in states]
        self._slabs = self.slabs(padded_rows(num_rows, self.device))
        rows = self._slabs.num_rows
        shape = (num_pages, page_size, *(caches[0].row_shape if caches else (0, 0)))
        # [2 layers, pages ...]: a page of all layers is copied at once.
        self._kv = torch.zeros(2 * len(caches), *shape, dtype=model.dtype, device=self.device)
        self._has_pages = bool(caches)
        self.page_bytes = self._kv[:, 0].nbytes
        most = num_pages - 1 if caches else 0
        self._table = torch.zeros(rows, most, dtype=torch.int32, device=self.device)
        self._length = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.active = torch.zeros(rows, dtype=torch.int32, device=self.device)  # 1: the row takes part in decoding
        self._layers = self._with_pages(states)

    def _with_pages(self, states: Sequence[State | None]) -> list[State | None]:
        """Each layer's memory of all rows."""
        layers: list[State | None] = []
        pairs = iter(self._kv.unflatten(0, (-1, 2)))
        for index, state in enumerate(states):
            constant = self._slabs.of_layer(index)
            if isinstance(state, KVCache):
                key, value = next(pairs)
                layers.append(PagedKVCache(key, value, self._table, self._length, constant.get("conv")))
            else:
                layers.append(None if state is None else replace(state, **constant))  # type: ignore[type-var]  # a dataclass
        return layers

    @property
    def num_bytes(self) -> int:
        """Of all rows and pages."""
        return self._slabs.num_bytes + self._kv.nbytes + self._table.nbytes + self._length.nbytes + self.active.nbytes

    @property
    def row_bytes(self) -> int:
        """Of one row's constant states."""
        return self._slabs.num_bytes // self._slabs.num_rows

    def pages_for(self, num_tokens: int) -> int:
        """Pages of a row with so many tokens; 0 where no layer has keys and values."""
        return -(-num_tokens // self.page_size) if self._has_pages else 0

    def pages_seen(self, num_tokens: int) -> int:
        """As `pages_for`, without those that no token after these sees."""
        return self.pages_for(num_tokens) - self._gone(num_tokens)

    def pages_of(self, row: int) -> tuple[int, ...]:
        """The pages that a row holds, in order."""
        return tuple(self._held[row][self._num_gone[row] :])

    def _gone(self, num_tokens: int) -> int:
        """Pages at the beginning of a sequence that its sliding window has left behind."""
        return 0 if self._window is None else max(0, num_tokens - self._window + 1) // self.page_size

    def _let_go(self, row: int) -> None:
        """Free the pages that no later token of the row sees."""
        known, gone = self._num_gone[row], self._gone(self.num_tokens[row])
        if gone > known:
            self.pages.release(self._held[row][known:gone])
            self._held[row][known:gone] = [0] * (gone - known)
            self._num_gone[row] = gone

    def reserve(self, row: int, num_tokens: int) -> None:
        """Give the row pages for so many tokens in all, those that it has included.

        Raises:
            OutOfPages: fewer are free; nothing was taken.
        """
        held = self._held[row]
        wanted = self.pages_for(num_tokens) - len(held)
        if wanted > 0:
            held += self.pages.allocate(wanted)
            self._write_table(row, len(held) - wanted)

    def _write_table(self, row: int, first: int = 0) -> None:
        """Tell the device of a row's pages from the first one on."""
        pages = self._held[row][first:]
        self._table[row, first : first + len(pages)] = to_device(pages, torch.int32, self.device)

    def _set_length(self, row: int, num_tokens: int) -> None:
        self.num_tokens[row] = num_tokens
        self._length[row].fill_(num_tokens)  # an assignment of one number waits for the device

    @torch.inference_mode()
    def state(self, rows: Sequence[int]) -> ModelState:
        """What forward takes: copies of the rows' constant states, and their pages, in which it writes new tokens.

        Those are nobody's until `store`: forward may be called again from here.
        """
        lengths = [self.num_tokens[row] for row in rows]
        fresh = [place for place, length in enumerate(lengths) if length == 0]
        constants = self._slabs.read(rows, fresh)
        index = to_device(rows, torch.int64, self.device)
        table = self._table[index, : max(len(self._held[row]) for row in rows)]
        length = self._length[index]
        dense = len(set(lengths)) == 1
        first = _first_of_run(self._held[rows[0]], self._num_gone[rows[0]]) if len(rows) == 1 else None
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
            self.num_tokens[row] += count
            assert self.pages_for(self.num_tokens[row]) <= len(self._held[row]), f"row {row} outgrew its pages"
            self._let_go(row)
        self._tell_lengths(rows)

    def slabs(self, count: int) -> Slabs:
        """Memory for `count` constant states."""
        return Slabs(self._constants, count, self.device)

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
        self._tell_lengths(rows)

    def _tell_lengths(self, rows: Sequence[int]) -> None:
        """The device needs them for keys and values alone."""
        if not self._has_pages:
            return
        new = to_device([self.num_tokens[row] for row in rows], torch.int32, self.device)
        self._length[to_device(rows, torch.int64, self.device)] = new

    def leading(self, count: int) -> ModelState:
        """The memory of the first rows itself, for a decoder that overwrites it: see `advance`."""
        layers = [None if layer is None else layer._map(lambda tensor: tensor[:count]) for layer in self._layers]
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
        for row in range(count):
            self.num_tokens[row] += 1
            if self._has_pages:
                assert self.pages_for(self.num_tokens[row]) <= len(self._held[row]), f"row {row} outgrew its pages"
                self._let_go(row)

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """The row is free, and as before the first token."""
        self.pages.release(self.pages_of(row))
        self._held[row], self._num_gone[row] = [], 0
        self._table[row] = 0
        self._set_length(row, 0)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """What one row has is another's, which was free; the first is free then."""
        self._require_free(target)
        self._slabs.copy(source, target)
        self._held[target], self._held[source] = self._held[source], []
        self._num_gone[target], self._num_gone[source] = self._num_gone[source], 0
        self._table[target] = self._table[source]
        self._set_length(target, self.num_tokens[source])
        self.clear(source)

    @torch.inference_mode()
    def fork(self, source: int, target: int) -> None:
        """A free row goes on from where another is; full pages are shared, a partly filled one is copied.

        Raises:
            OutOfPages: no page is free for that copy; nothing was changed.
        """
        self._require_free(target)
        self._share(target, self.num_tokens[source], self._pages_seen_by(source))
        self._slabs.copy(source, target)

    @torch.inference_mode()
    def snapshot(self, row: int) -> Snapshot:
        """The row as it is; to be given back by `release`."""
        num_tokens = self.num_tokens[row]
        pages = tuple(self._pages_seen_by(row))
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
        pages = torch.tensor(snapshot.pages, dtype=torch.int64, device=self.device)
        return tensors | {"pages": self._kv.index_select(1, pages).cpu()}

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
        stored, count = tensors["pages"], self.pages_seen(num_tokens)
        wanted = (self._kv.shape[0], count, *self._kv.shape[2:])
        if stored.shape != wanted or stored.dtype != self._kv.dtype:
            raise UserError(
                f"pages of a snapshot are {list(stored.shape)} {stored.dtype}, and here {list(wanted)} {self._kv.dtype}"
            )
        pages = self.pages.allocate(count)
        self._kv[:, torch.tensor(pages, dtype=torch.int64, device=self.device)] = stored.to(self.device)
        states = tuple(tensors[name].to(self.device) for name in names)
        return Snapshot(num_tokens, states, tuple(pages), self.page_bytes)

    def _pages_seen_by(self, row: int) -> list[int]:
        """Those with tokens that the row's next one sees."""
        num_tokens = self.num_tokens[row]
        return self._held[row][self._gone(num_tokens) : self.pages_for(num_tokens)]

    def _share(self, row: int, num_tokens: int, pages: Sequence[int]) -> None:
        """Give a free row the full ones of these pages, which it sees after so many tokens, and a copy of the last."""
        gone = self._gone(num_tokens)
        full = num_tokens // self.page_size - gone if self._has_pages else 0
        copy = self.pages.allocate(len(pages) - full)
        self.pages.retain(pages[:full])
        self._held[row], self._num_gone[row] = [0] * gone + [*pages[:full], *copy], gone
        for new in copy:
            self._kv[:, new] = self._kv[:, pages[full]]
        self._write_table(row)
        self._set_length(row, num_tokens)

    def _require_free(self, row: int) -> None:
        assert not self.num_tokens[row] and not self._held[row], f"row {row} is in use"


def _constant(state: State | None) -> dict[str, Tensor]:
    """The tensors of a layer that do not grow with the sequence."""
    if state is None:
        return {}
    if isinstance(state, KVCache):
        return {} if state.conv is None else {"conv": state.conv}
    return state.tensors()


def _first_of_run(pages: Sequence[int], num_gone: int) -> int | None:
    """The first page, if each of the others follows the one before; those that were let go may be any."""
    held = pages[num_gone:]
    if not held or held[0] < num_gone or list(held) != list(range(held[0], held[0] + len(held))):
        return None
    return held[0] - num_gone


def padded_rows(num_rows: int, device: torch.device) -> int:
    """Rows of memory: on a GPU a step may run on more rows than are in use (see `bucket`)."""
    return bucket(num_rows) if device.type == "cuda" else num_rows


def bucket(num_rows: int) -> int:
    """The number of rows of a step that so many take part in: 1, 2, 4, 8, 16, and then multiples of 16."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 16 else -(-num_rows // 16) * 16
