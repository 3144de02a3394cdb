"""Copying and selective copying: the tokens that a row showed, in order, once it is over."""

import torch
from torch import Tensor

from statespan.evaluation.batch import NOT_ASKED, TaskBatch, distinct, generator, require

NOISE = 0  # token; the last token of the vocabulary is the marker that asks


def copying(
    seed: int,
    batch_size: int,
    *,
    length: int,
    num_tokens: int = 16,
    vocab_size: int = 16,
    device: torch.device | str = "cpu",
) -> TaskBatch:
    """Standard copying: the tokens stand at the beginning, so that each answer is a fixed time after its token.

    A linear time-invariant model can learn it: a delay is a convolution.

    Args:
        As for `selective_copying`.
    Returns:
        Rows as there, with the tokens in the first places.
    Raises:
        UserError: sizes that leave no place or no token.
    """
    return _copying("copying", False, seed, batch_size, length, num_tokens, vocab_size, device)


def selective_copying(
    seed: int,
    batch_size: int,
    *,
    length: int,
    num_tokens: int = 16,
    vocab_size: int = 16,
    device: torch.device | str = "cpu",
) -> TaskBatch:
    """Selective copying: the tokens stand at random places in noise, and are asked for in their order.

    Args:
        seed: of the batch; the same seed and device give the same rows.
        batch_size: rows.
        length: places for tokens; noise (0) stands elsewhere.
        num_tokens: tokens to remember, at most `length`.
        vocab_size: noise, vocab_size - 2 kinds of tokens, and the marker.
        device: where the rows are made.
    Returns:
        Rows of length + num_tokens + 1: the places, then markers. After the i-th marker token i is asked.
    Raises:
        UserError: sizes that leave no place or no token.

    Example:
        >>> batch = selective_copying(0, 1, length=6, num_tokens=2)
        >>> batch.input_ids.shape, (batch.labels >= 0).sum().item()
        (torch.Size([1, 9]), 2)
    """
    return _copying("selective_copying", True, seed, batch_size, length, num_tokens, vocab_size, device)


def _copying(
    task: str,
    scattered: bool,
    seed: int,
    batch_size: int,
    length: int,
    num_tokens: int,
    vocab_size: int,
    device: torch.device | str,
) -> TaskBatch:
    require(num_tokens >= 1, task, f"num_tokens must be at least 1, got {num_tokens}")
    require(length >= num_tokens, task, f"length {length} has no place for num_tokens {num_tokens}")
    require(vocab_size >= 4, task, f"vocab_size must be at least 4: noise, two tokens and the marker; got {vocab_size}")
    random = generator(seed, device)
    tokens = torch.randint(1, vocab_size - 1, (batch_size, num_tokens), generator=random, device=device)
    places = torch.arange(num_tokens, device=device).expand(batch_size, -1)
    if scattered:
        places = distinct(random, batch_size, num_tokens, length).sort(dim=1).values
    input_ids = torch.full((batch_size, length + num_tokens + 1), vocab_size - 1, device=device)
    input_ids[:, :length] = NOISE
    input_ids.scatter_(1, places, tokens)
    return TaskBatch(input_ids, _asked_at_the_end(input_ids, tokens), num_tokens)


def _asked_at_the_end(input_ids: Tensor, answers: Tensor) -> Tensor:
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, -answers.shape[1] :] = answers
    return labels
