"""Induction heads and multi-query associative recall: what followed a token the last time."""

import torch

from statespan.evaluation.batch import NOT_ASKED, TaskBatch, distinct, generator, require


def induction_heads(
    seed: int, batch_size: int, *, length: int, vocab_size: int = 16, device: torch.device | str = "cpu"
) -> TaskBatch:
    """One special token stands somewhere in a random row and again at its end: what followed it the first time?

    Args:
        seed: of the batch; the same seed and device give the same rows.
        batch_size: rows.
        length: tokens that the model reads, both special ones included; at least 3.
        vocab_size: vocab_size - 1 ordinary tokens, and the special one.
        device: where the rows are made.
    Returns:
        Rows of length + 1: `length` tokens, and the answer, the only one that is asked.
    Raises:
        UserError: sizes that cannot work.

    Example:
        >>> batch = induction_heads(0, 2, length=8)
        >>> batch.input_ids[:, 7].tolist(), batch.labels[0, :8].unique().tolist()
        ([15, 15], [-100])
    """
    task = "induction_heads"
    require(length >= 3, task, f"length must be at least 3: the special token, what follows, and the end; got {length}")
    require(vocab_size >= 3, task, f"vocab_size must be at least 3, got {vocab_size}")
    random, special = generator(seed, device), vocab_size - 1
    input_ids = torch.randint(0, special, (batch_size, length + 1), generator=random, device=device)
    place = torch.randint(0, length - 2, (batch_size, 1), generator=random, device=device)
    input_ids.scatter_(1, place, special)
    input_ids[:, length - 1] = special
    answer = input_ids.gather(1, place + 1)
    input_ids[:, length:] = answer
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels[:, length:] = answer
    return TaskBatch(input_ids, labels, 1)


def associative_recall(
    seed: int,
    batch_size: int,
    *,
    length: int,
    num_pairs: int,
    vocab_size: int = 8192,
    power: float = 0.01,
    device: torch.device | str = "cpu",
) -> TaskBatch:
    """MQAR, the hard form: pairs of key and value, then each key once more among random tokens; its value is asked.

    Gaps between a key and its query follow p(gap) ~ gap^(power - 1), as in Zoology (arXiv 2312.04927, appendix).

    Args:
        seed: of the batch; the same seed and device give the same rows.
        batch_size: rows.
        length: tokens a row, even; the pairs take 2 num_pairs of them.
        num_pairs: pairs of a key and a value, at most length / 4. No key stands twice.
        vocab_size: keys are tokens 1 .. vocab_size / 2 - 1, values the upper half.
        power: exponent of the gaps; small: short gaps are likelier.
        device: where the rows are made.
    Returns:
        Rows of `length`: the value is asked after each key's second time, and does not stand there again.
    Raises:
        UserError: sizes that cannot work.
    """
    task, half = "associative_recall", vocab_size // 2
    require(num_pairs >= 1, task, f"num_pairs must be at least 1, got {num_pairs}")
    require(length % 2 == 0 and length >= 4 * num_pairs, task, f"length {length} must be even and 4 num_pairs or more")
    require(half > num_pairs, task, f"vocab_size {vocab_size} has too few keys for num_pairs {num_pairs}")
    random = generator(seed, device)
    keys = 1 + distinct(random, batch_size, num_pairs, half - 1)
    values = torch.randint(half, vocab_size, (batch_size, num_pairs), generator=random, device=device)
    num_gaps = length // 2 - num_pairs
    weights = torch.arange(1, num_gaps + 1, device=device, dtype=torch.float64) ** (power - 1)
    gaps = torch.multinomial(weights.expand(batch_size, -1), num_pairs, generator=random)
    places = 2 * num_pairs + 2 * gaps
    input_ids = torch.randint(0, vocab_size, (batch_size, length), generator=random, device=device)
    input_ids[:, : 2 * num_pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    input_ids.scatter_(1, places, keys)
    labels = torch.full_like(input_ids, NOT_ASKED)
    labels.scatter_(1, places + 1, values)
    return TaskBatch(input_ids, labels, num_pairs)
