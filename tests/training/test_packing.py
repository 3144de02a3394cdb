"""Rows: each pair inside a document once an epoch, documents apart, an order that follows from the place alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from statespan.checkpoints import ByteTokenizer
from statespan.training.data import Corpus, build_corpus
from statespan.training.packing import DataPosition, PackedRows

T = 8


@pytest.fixture
def corpus() -> Corpus:
    """Documents of 1 to 40 tokens; every token of the corpus is another byte."""
    data, documents = bytes(range(128)), []
    for length in (1, 5, 40, 8, 2, 30, 1, 20, 3, 15):
        documents.append(data[:length].decode())
        data = data[length:]
    return build_corpus(documents, ByteTokenizer())


def epoch(rows: PackedRows, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows and segment rows of a whole epoch."""
    batch, position = rows.batch(DataPosition(number), rows.num_rows)
    assert position == DataPosition(number + 1)
    assert batch.segments is not None
    return batch.input_ids, batch.segments


def pairs_in_rows(ids: torch.Tensor, segments: torch.Tensor) -> Counter[tuple[int, int]]:
    same = segments[:, 1:] == segments[:, :-1]
    return Counter(zip(ids[:, :-1][same].tolist(), ids[:, 1:][same].tolist(), strict=True))


def test_every_pair_inside_a_document_is_predicted_once(corpus: Corpus):
    rows = PackedRows(corpus, T, seed=0)
    wanted = Counter()
    for i in range(len(corpus)):
        document = corpus.document(i).tolist()
        wanted.update(pairwise(document))
    for number in range(4):
        ids, segments = epoch(rows, number)
        assert ids.shape == (rows.num_rows, T)
        found = pairs_in_rows(ids, segments)
        assert set(found.values()) == {1}
        assert not found - wanted  # no pair across documents
        left_out = (corpus.num_tokens - 1) - rows.num_rows * (T - 1)  # places of the stream after the last row
        assert (wanted - found).total() <= left_out < T - 1


def test_segments_number_the_documents_of_a_row(corpus: Corpus):
    rows = PackedRows(corpus, T, seed=3)
    owner = {token: i for i in range(len(corpus)) for token in corpus.document(i).tolist()}
    for ids, segments in zip(*epoch(rows), strict=True):
        owners = [owner[token] for token in ids.tolist()]
        numbers = [0]
        for before, after in pairwise(owners):
            numbers.append(numbers[-1] + (before != after))
        assert segments.tolist() == numbers


def test_counts_of_a_batch(corpus: Corpus):
    rows = PackedRows(corpus, T, seed=1)
    batch, _ = rows.batch(DataPosition(), 5)
    assert batch.segments is not None
    assert batch.num_predicted == pairs_in_rows(batch.input_ids, batch.segments).total() == batch.num_bytes


def test_bytes_are_those_of_the_predicted_tokens():
    tokens = np.arange(20, dtype=np.uint8)
    sizes = np.arange(20, dtype=np.uint32) * 10
    corpus = Corpus(tokens, sizes, np.array([0, 12]), np.array([12, 8]))
    batch, _ = PackedRows(corpus, 5, seed=0).batch(DataPosition(), 4)
    assert batch.segments is not None
    predicted = batch.input_ids[:, 1:][batch.segments[:, 1:] == batch.segments[:, :-1]]
    assert batch.num_bytes == 10 * int(predicted.sum())


def test_orders_differ_between_epochs_and_seeds_and_rows_are_shuffled(corpus: Corpus):
    rows = PackedRows(corpus, T, seed=0)
    first, again, second = epoch(rows, 0)[0], epoch(PackedRows(corpus, T, seed=0), 0)[0], epoch(rows, 1)[0]
    other = epoch(PackedRows(corpus, T, seed=1), 0)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, epoch(rows, 0)[0])  # going back
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    neighbours = sum(int(a[-1] == b[0]) for a, b in pairwise(first))
    assert neighbours < rows.num_rows // 2  # unshuffled, each row begins with the last token of the one before


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_batches_of_any_size_go_through_the_same_rows_across_epochs(corpus: Corpus, size: int):
    rows = PackedRows(corpus, T, seed=0)
    wanted = torch.cat([epoch(rows, number)[0] for number in range(5)])
    position, taken = DataPosition(), []
    while sum(map(len, taken)) + size <= len(wanted):
        batch, position = rows.batch(position, size)
        taken.append(batch.input_ids)
    found = torch.cat(taken)
    assert torch.equal(found, wanted[: len(found)])
    assert position == DataPosition(len(found) // rows.num_rows, len(found) % rows.num_rows)


def test_rows_of_single_documents_need_no_segments():
    corpus = build_corpus(["x" * 50], ByteTokenizer())
    batch, _ = PackedRows(corpus, T, seed=0).batch(DataPosition(), 3)
    assert batch.segments is None
    assert batch.num_predicted == 3 * (T - 1)


def test_smallest_corpus_and_row():
    corpus = build_corpus(["ab"], ByteTokenizer())
    batch, position = PackedRows(corpus, 2, seed=0).batch(DataPosition(), 2)
    assert batch.input_ids.tolist() == [[97, 98], [97, 98]]
    assert position == DataPosition(2)
