"""Rows for training: documents laid end to end in a shuffled order, cut into rows, and the rows shuffled.

Row r of an epoch is the stretch [r (T - 1), r (T - 1) + T) of the epoch's stream of tokens: neighbours share one token,
so that every next-token pair inside a document is predicted exactly once an epoch (the last few, less than a row, are
left out; another order leaves out others). A row's `segments` number its documents: a document longer than a row goes
on in another row, where the state starts from zero. The order follows from (seed, epoch) alone, so a place in the
data is two numbers.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from statespan.training.data import Corpus


@dataclass(frozen=True)
class DataPosition:
    """The next row to train on."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents."""

    input_ids: Tensor  # [b t] int64
    segments: Tensor | None  # [b t] int64, the document's number in its row; None: one document a row
    num_predicted: int  # next-token pairs inside documents, what the mean loss is over
    num_bytes: int  # bytes of text of the predicted tokens


@dataclass(frozen=True)
class _Epoch:
    """The order of one pass over the corpus."""

    number: int
    documents: NDArray[np.int64]  # in the order of the stream
    ends: NDArray[np.int64]  # place in the stream after each of them
    rows: NDArray[np.int64]  # in the order of training


class PackedRows:
    """The rows of a corpus in the order of training.

    Args:
        corpus: at least `sequence_length` tokens.
        sequence_length: tokens a row, T.
        seed: of the order.

    Example:
        >>> from statespan.training.data import ByteTokenizer, build_corpus
        >>> corpus = build_corpus(["one document", "another"], ByteTokenizer())
        >>> batch, position = PackedRows(corpus, sequence_length=8, seed=0).batch(DataPosition(), 2)
        >>> batch.input_ids.shape, position
        (torch.Size([2, 8]), DataPosition(epoch=1, row=0))
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int) -> None:
        self.corpus, self.sequence_length, self.seed = corpus, sequence_length, seed
        self.num_rows = (corpus.num_tokens - 1) // (sequence_length - 1)  # an epoch
        self._epoch = self._plan(0)

    def batch(self, position: DataPosition, num_rows: int) -> tuple[Batch, DataPosition]:
        """The `num_rows` rows from `position` on, into the next epoch where need be, and the position after them."""
        rows = list[tuple[NDArray[np.int64], NDArray[np.int64], int]]()
        for _ in range(num_rows):
            rows.append(self._row(position))
            last = position.row + 1 == self.num_rows
            position = DataPosition(position.epoch + 1) if last else DataPosition(position.epoch, position.row + 1)
        input_ids, segments = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
        batch = Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(segments) if segments.any() else None,
            num_predicted=int((segments[:, 1:] == segments[:, :-1]).sum()),
            num_bytes=sum(row[2] for row in rows),
        )
        return batch, position

    def _plan(self, number: int) -> _Epoch:
        random = np.random.default_rng((self.seed, number))
        documents = random.permutation(len(self.corpus))
        return _Epoch(number, documents, np.cumsum(self.corpus.lengths[documents]), random.permutation(self.num_rows))

    def _row(self, position: DataPosition) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Tokens [t] and segments [t] of a row, and the bytes of its predicted tokens."""
        if position.epoch != self._epoch.number:
            self._epoch = self._plan(position.epoch)
        epoch, num_bytes = self._epoch, 0
        tokens, segments = np.empty(self.sequence_length, np.int64), np.empty(self.sequence_length, np.int64)
        row_start = int(epoch.rows[position.row]) * (self.sequence_length - 1)  # places are in the epoch's stream
        row_stop = row_start + self.sequence_length
        first = int(np.searchsorted(epoch.ends, row_start, side="right"))
        place, index = row_start, first
        while place < row_stop:
            document, end = int(epoch.documents[index]), int(epoch.ends[index])
            document_start, stop = end - int(self.corpus.lengths[document]), min(row_stop, end)
            inside, here = (place - document_start, stop - document_start), slice(place - row_start, stop - row_start)
            tokens[here] = self.corpus.document(document, *inside)
            segments[here] = index - first
            num_bytes += self.corpus.count_bytes(document, inside[0] + 1, inside[1])
            place, index = stop, index + 1
        return tokens, segments, num_bytes
