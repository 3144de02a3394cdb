"""How many of a task's answers a model gives."""

from dataclasses import dataclass

import torch

from statespan.evaluation.batch import NOT_ASKED, TaskBatch
from statespan.models.language_model import LanguageModel


@dataclass(frozen=True)
class Accuracy:
    """Shares, 0 to 1."""

    tokens: float  # of the asked tokens, each predicted with the right ones before it
    rows: float  # of the rows whose asked tokens are all right


@torch.no_grad()
def answer_accuracy(
    model: LanguageModel, batch: TaskBatch, *, chunk_length: int = 2048, precision: torch.dtype = torch.float32
) -> Accuracy:
    """The share of the asked tokens to which `model` gives the highest logit.

    Args:
        model: put into evaluation mode for the time, and left as it was.
        batch: rows of a task, on any device.
        chunk_length: tokens a forward; the state is carried from chunk to chunk, so that memory does not grow with the
            length (but for the keys and values of attention). It changes nothing else.
        precision: torch.bfloat16 runs the model under autocast.
    Returns:
        Shares of tokens and of rows; without an asked token 0 and 1.

    Example:
        >>> import statespan
        >>> from statespan.evaluation import copying
        >>> model = statespan.build(statespan.ModelConfig(vocab_size=16, hidden_size=16), seed=0)
        >>> 0 <= answer_accuracy(model, copying(0, 2, length=8, num_tokens=3)).tokens <= 1
        True
    """
    training, device = model.training, model.device
    asked = batch.labels[:, 1:] != NOT_ASKED
    right = torch.zeros_like(asked)
    model.eval()
    try:
        state = model.new_state(batch.input_ids.shape[0])
        for start in range(0, asked.shape[1], chunk_length):
            here = slice(start, min(start + chunk_length, asked.shape[1]))
            wanted = bool(asked[:, here].any())
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                output = model(batch.input_ids[:, here].to(device), state=state, logits_at="all" if wanted else "none")
            state = output.state
            if wanted:
                assert output.logits is not None  # asked for
                guess = output.logits.argmax(-1).to(right.device)
                right[:, here] = guess == batch.labels[:, 1:][:, here]
    finally:
        model.train(training)
    right &= asked
    return Accuracy(
        tokens=right.sum().item() / max(asked.sum().item(), 1),
        rows=(right == asked).all(dim=1).float().mean().item(),
    )
