"""Runner: the model's forward over the rows of a StatePool, for chunks of prompts and for the next tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.models.prefill import Prefiller
from statespan.models.transfer import to_device
from statespan.serving.pool_memory import bucket
from statespan.serving.state_pool import StatePool

PADDED_TOKENS = 32  # a chunk may always be padded to so many
TOGETHER_SLOTS = 1 << 15  # of keys and values that rows of unequal length, which need a mask, may have together


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a row's prompt."""

    row: int
    token_ids: tuple[int, ...]


class Runner:
    """Feeds tokens to rows of a pool; not for two threads at once.

    Args:
        model: in evaluation.
        pool: of this model's states.
    """

    def __init__(self, model: LanguageModel, pool: StatePool) -> None:
        self.model, self.pool = model, pool
        self.num_prefilled = 0  # tokens of prompts so far
        self._steps: dict[int, Callable[[], Tensor]] = {}  # by the number of rows
        self._ids = torch.zeros_like(pool.active, dtype=torch.int64)
        self._decoding = -1  # rows that the device knows to be active

    @torch.inference_mode()
    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Feed each chunk to its row; the rows get pages where they have too few.

        Args:
            chunks: of different rows, each with one token at least.

        Returns:
            Logits [n v] float32 after each chunk's last token.

        Raises:
            UserError: a chunk is empty, or a token is not in the vocabulary.
            OutOfPages: the pool has too few pages.
        """
        return self.model.head(self._last_hidden(chunks)).float()

    @torch.inference_mode()
    def absorb(self, chunks: Sequence[Chunk]) -> None:
        """As `prefill`, without the work for logits that nobody reads."""
        self._last_hidden(chunks)

    @torch.inference_mode()
    def embed(self, chunks: Sequence[Chunk]) -> Tensor:
        """As `prefill`, and gives the last norm's output [n h] float32 in place of logits."""
        return self.model.normed(self._last_hidden(chunks)).float()

    def _last_hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """The residual stream [n h] after each chunk's last token."""
        for chunk in chunks:
            self._check(chunk.token_ids)
            self.num_prefilled += len(chunk.token_ids)
            self.pool.reserve(chunk.row, self.pool.num_tokens[chunk.row] + len(chunk.token_ids))
        groups = self._groups(chunks)
        hidden = torch.cat([self._feed([chunks[place] for place in group]) for group in groups])
        order = [place for group in groups for place in group]
        return hidden if order == sorted(order) else hidden[to_device(_inverse(order), torch.int64, hidden.device)]

    def _check(self, token_ids: Sequence[int]) -> None:
        size = self.model.config.vocab_size
        if not token_ids:
            raise UserError("a chunk of a prompt must have a token")
        if min(token_ids) < 0 or max(token_ids) >= size:
            raise UserError(f"token ids must be in 0 to {size - 1}, got {min(token_ids)} to {max(token_ids)}")

    def _groups(self, chunks: Sequence[Chunk]) -> list[list[int]]:
        """Places of the chunks that share a forward: of like length, and short where a mask is needed."""
        groups: list[list[int]] = []
        shape = least = slots = 0
        for place in sorted(range(len(chunks)), key=lambda place: len(chunks[place].token_ids)):
            count, known = len(chunks[place].token_ids), self.pool.num_tokens[chunks[place].row]
            if groups:
                group = groups[-1]
                longest = max(slots, known + count)
                same = (count, known) == shape
                near = count <= max(2 * least, PADDED_TOKENS) and longest * (len(group) + 1) <= TOGETHER_SLOTS
                if same or near:
                    group.append(place)
                    shape, slots = (shape if same else None), longest
                    continue
            groups.append([place])
            shape, least, slots = (count, known), count, known + count
        return groups

    def _feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """One forward, rows padded on the left: the residual stream [n h] after the last tokens."""
        model, rows = self.model, [chunk.row for chunk in chunks]
        counts = [len(chunk.token_ids) for chunk in chunks]
        longest = max(counts)
        ids = torch.tensor([[0] * (longest - len(chunk.token_ids)) + list(chunk.token_ids) for chunk in chunks])
        if len(rows) == 1 and Prefiller.serves(1, longest) and self._prefiller is not None:
            self._prefiller.start(self.pool.state(rows))
            hidden = self._prefiller.feed(ids)[:, -1].clone()  # the next group's overwrites it
            self.pool.store(rows, self._prefiller.memory, counts)
            return hidden
        segments = None
        if min(counts) < longest:
            padding = longest - torch.tensor(counts)
            real = torch.where(torch.arange(longest) < padding[:, None], -1, 0)
            segments = to_device(real, torch.int64, model.device)
        hidden = model.embedding(to_device(ids, torch.int64, model.device)).to(model.stream_dtype)
        hidden, state, _, _ = model.backbone(hidden, self.pool.state(rows), segments)
        assert state is not None  # a state went in
        self.pool.store(rows, state, counts)
        return hidden[:, -1]

    @cached_property
    def _prefiller(self) -> Prefiller | None:
        """Of one row; those of several are left to the model's own forward."""
        return self.model.prefiller(1)

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Feed a token to each of the first len(token_ids) rows, which have pages for it.

        On a GPU the step is a CUDA graph, captured when a number of rows (of `bucket`) comes for the second time.

        Args:
            token_ids: of the vocabulary. As a tensor [n] int64 they are not looked at, so that nothing waits for a GPU.

        Returns:
            Logits [n v] float32, overwritten by the next call.
        """
        count = len(token_ids)
        if not isinstance(token_ids, Tensor):
            self._check(token_ids)
            token_ids = to_device(token_ids, torch.int64, self._ids.device)
        self.pool.advance(count)
        self._ids[:count].copy_(token_ids)
        return self._step(count, self._batch_size(count))[:count]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture all graphs now; the rows stay as they are. Elsewhere than on a GPU nothing is to be done."""
        for size in self.graph_sizes:
            for _ in range(2):
                self._step(0, size)

    @property
    def graph_sizes(self) -> list[int]:
        """Numbers of rows for which there are CUDA graphs, the largest first."""
        counts = range(1, self.pool.num_rows) if self._ids.is_cuda else ()  # one row is never decoded
        return sorted({bucket(count) for count in counts}, reverse=True)

    def activate(self, count: int) -> None:
        """The first `count` rows take part in the next steps."""
        if count != self._decoding:
            self.pool.active[:count].fill_(1)
            self.pool.active[count:].fill_(0)
            self._decoding = count

    def _batch_size(self, count: int) -> int:
        return bucket(count) if self._ids.is_cuda else count

    def _step(self, count: int, size: int) -> Tensor:
        """Run on `size` rows, of which the first `count` take part: logits [size v]."""
        self.activate(count)
        if size not in self._steps:
            self._steps[size] = self._make_step(size)
        # Idle rows write to no page, but their constant states go on; of those being prefilled they are needed.
        waiting = range(count, min(size, self.pool.num_rows))
        with self.pool.untouched([row for row in waiting if self.pool.num_tokens[row]]):
            return self._steps[size]()

    def _make_step(self, size: int) -> Callable[[], Tensor]:
        ids = self._ids[:size]
        decoder = self.model.decoder(size, memory=self.pool.leading(size), active=self.pool.active[:size])
        return decoder.captured(lambda: decoder(ids).float())


def _inverse(order: Sequence[int]) -> Tensor:
    """Where in `order` each place is."""
    return torch.tensor(order).argsort()
