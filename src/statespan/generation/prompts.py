"""What users give as prompts, read into lists of token ids."""

from collections.abc import Sequence
from operator import index
from typing import Any, TypeAlias

from torch import Tensor

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel, Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Tensor
Prompts: TypeAlias = Sequence[str] | Sequence[Sequence[int]] | Tensor


def is_single(prompt: Prompt | Prompts) -> bool:
    """Whether this is one prompt: text, ids or a [t] tensor, and not a list of prompts or a [b t] tensor."""
    if isinstance(prompt, Tensor):
        return prompt.dim() == 1
    return isinstance(prompt, str) or not isinstance(next(iter(prompt), None), str | Sequence | Tensor)


def read_prompts(
    model: LanguageModel,
    prompt: Prompt | Prompts,
    *,
    tokenizer: Tokenizer | None,
    attention_mask: Tensor | None,
    continues: bool,
) -> list[list[int]]:
    """The token ids of each prompt, checked. An empty one becomes the BOS token, unless it `continues` a state.

    Raises:
        UserError: no text, list or tensor, text without a tokenizer, no tokens and no BOS token, ids out of range, a
            mask of another shape.
    """
    if not _lasts(prompt):
        kind = type(prompt).__name__
        raise UserError(f"a prompt is text or a list of token ids, several are a list of these; got one {kind}")
    if attention_mask is not None:
        rows: list[Any] = _unpad(prompt, attention_mask)
    else:
        rows = [prompt] if is_single(prompt) else list(prompt)
    bos = model.config.bos_token_id
    if bos is None and tokenizer is not None:
        bos = tokenizer.bos_id
    prompts: list[list[int]] = []
    for place, row in enumerate(rows):
        ids = _encode(row, tokenizer) if isinstance(row, str) else _ids(row, place)
        if continues and isinstance(row, str) and ids[:1] == [bos]:
            ids = ids[1:]  # BOS begins a text; here the text goes on
        if not ids and not continues:
            if bos is None:
                raise UserError(f"prompt {place} is empty and the model has no BOS token; give at least one token")
            ids = [bos]
        _check_range(ids, place, model.config.vocab_size)
        prompts.append(ids)
    return prompts


def _lasts(prompt: Any) -> bool:
    """Whether it has parts, and still has them once they were looked at, as an iterator has not."""
    if isinstance(prompt, Tensor):
        return prompt.dim() > 0
    try:
        return iter(prompt) is not prompt
    except TypeError:
        return False


def _unpad(prompt: Prompt | Prompts, attention_mask: Tensor) -> list[list[int]]:
    if not isinstance(prompt, Tensor):
        raise UserError("attention_mask goes with a [batch, time] tensor of ids; lists of prompts need none")
    if prompt.dim() != 2 or prompt.shape != attention_mask.shape:
        raise UserError(
            f"attention_mask is {list(attention_mask.shape)} and the ids {list(prompt.shape)}; "
            "both must be the same [batch, time]"
        )
    return [ids[mask != 0].tolist() for ids, mask in zip(prompt, attention_mask, strict=True)]


def _encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise UserError("the model has no tokenizer; give token ids, or pass tokenizer=")
    return tokenizer.encode(text)


def _ids(row: Any, place: int) -> list[int]:
    try:
        return list(map(index, row.tolist() if isinstance(row, Tensor) else row))
    except TypeError:
        raise UserError(f"prompt {place} is neither text nor a list of integers: {str(row)[:60]!r}") from None


def _check_range(ids: list[int], place: int, vocab_size: int) -> None:
    for value in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= value < vocab_size:
            raise UserError(
                f"token id {value} of prompt {place} is out of range; the vocabulary is 0 to {vocab_size - 1}"
            )
