"""Bits per byte of held-out text: every byte counts once, and every document is read with its whole context.

How the bits are counted:
- a document goes through the model in chunks and its state is carried from chunk to chunk, so that a token is
  predicted from all tokens of its document before it (from those of its last `context_length` where that is set);
- nothing comes before a document's first token, so the bytes it stands for cost 8 bits each (a beginning token stands
  for none, and then the first token of the text is predicted);
- an end token costs its bits and stands for no byte;
- bits per byte = (sum of -log2 p(token) + 8 * bytes of first tokens) / bytes of the text.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from statespan.models.language_model import LanguageModel
from statespan.training.config import EvaluationConfig
from statespan.training.data import Corpus

MAX_LOGITS = 2**26  # entries of the logits of one forward, 256 MiB in float32


@dataclass(frozen=True)
class EvaluationResult:
    """How well a model predicts a text."""

    bits_per_byte: float
    loss: float  # nats a predicted token
    num_bytes: int  # of the text
    num_predicted: int  # tokens
    num_documents: int
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """A stretch of a document that starts from an empty state; its first token is context, not predicted."""

    document: int
    start: int
    length: int


def evaluate(
    model: LanguageModel,
    corpus: Corpus,
    config: EvaluationConfig | None = None,
    *,
    precision: torch.dtype = torch.float32,
    on_progress: Callable[[float], None] = lambda share: None,
) -> EvaluationResult:
    """Bits per byte and loss of `corpus` under `model`, counted as the module says.

    Args:
        model: put into evaluation mode for the time (no capacity drops, no Sinkhorn), and left as it was.
        corpus: the documents.
        config: context, batch and chunk sizes; they change the speed, and only `context_length` changes the result.
        precision: torch.bfloat16 evaluates under autocast.
        on_progress: called after each chunk with the share of the tokens done; what it raises ends the evaluation.
    Returns:
        Figures of the whole corpus; they do not depend on the batches and chunks.

    Example:
        >>> import statespan
        >>> from statespan.training.data import ByteTokenizer, build_corpus
        >>> corpus = build_corpus(["some text"], ByteTokenizer())
        >>> evaluate(statespan.build(statespan.ModelConfig(hidden_size=16)), corpus).num_bytes
        9
    """
    config = config or EvaluationConfig()
    started, training = time.perf_counter(), model.training
    pieces = sorted(_pieces(corpus, config.context_length), key=lambda piece: -piece.length)
    num_predicted, done, nats = sum(piece.length - 1 for piece in pieces), 0, 0.0
    model.eval()
    try:
        for first in range(0, len(pieces), config.batch_size):
            batch = pieces[first : first + config.batch_size]
            for chunk_nats, chunk_tokens in _chunks(model, corpus, batch, config.chunk_length, precision):
                nats += chunk_nats
                done += chunk_tokens
                on_progress(done / num_predicted)
    finally:
        model.train(training)
    first_bytes = sum(corpus.count_bytes(i, 0, 1) for i in range(len(corpus)))
    return EvaluationResult(
        bits_per_byte=(nats / math.log(2) + 8 * first_bytes) / corpus.num_bytes,
        loss=nats / max(num_predicted, 1),
        num_bytes=corpus.num_bytes,
        num_predicted=num_predicted,
        num_documents=len(corpus),
        seconds=time.perf_counter() - started,
    )


def _pieces(corpus: Corpus, context_length: int | None) -> Iterator[_Piece]:
    """Documents whole, or in stretches that overlap by one token, so that all but a document's first are predicted."""
    for document, length in enumerate(corpus.lengths.tolist()):
        longest = context_length or length
        for start in range(0, max(length - 1, 1), max(longest - 1, 1)):
            yield _Piece(document, start, min(longest, length - start))


def _chunks(
    model: LanguageModel, corpus: Corpus, pieces: list[_Piece], chunk_length: int, precision: torch.dtype
) -> Iterator[tuple[float, int]]:
    """Summed cross entropy and predicted tokens, chunk by chunk, of pieces side by side, longest first.

    A row leaves the batch when its piece is over.
    """
    chunk_length = max(1, min(chunk_length, MAX_LOGITS // (len(pieces) * model.config.padded_vocab_size)))
    state = model.new_state(len(pieces))
    for start in range(0, pieces[0].length - 1, chunk_length):
        live = [piece for piece in pieces if piece.length - 1 > start]
        if len(live) < state.batch_size:
            state = state.select(torch.arange(len(live)))
        input_ids, targets = (t.to(model.device) for t in _chunk(corpus, live, start, chunk_length))
        real = targets >= 0
        segments = None if real.all() else torch.where(real, 0, -1)
        with torch.no_grad(), torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
            output = model(input_ids, segments=segments, state=state)
        assert output.logits is not None and output.state is not None  # asked for by giving a state and no labels
        state = output.state
        nats = functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        yield nats.item(), int(real.sum())


def _chunk(corpus: Corpus, pieces: list[_Piece], start: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens [b t] from `start` of each piece and the tokens that follow them; -100 and 0 where a piece is over."""
    length = min(length, pieces[0].length - 1 - start)
    input_ids = torch.zeros(len(pieces), length, dtype=torch.int64)
    targets = torch.full((len(pieces), length), -100)
    for row, piece in enumerate(pieces):
        stop = min(start + length + 1, piece.length)
        tokens = torch.from_numpy(
            corpus.document(piece.document, piece.start + start, piece.start + stop).astype("int64")
        )
        input_ids[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    return input_ids, targets
