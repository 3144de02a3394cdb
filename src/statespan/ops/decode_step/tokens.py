"""The two ends of a decoding step on a GPU: the newest tokens to the residual stream, and logits to the best tokens."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from statespan.ops.decode_step.project import TYPES
from statespan.ops.dispatch import resolve

CHOOSE_THREADS = 512
CHOOSE_BLOCKS = 8  # of a row
SHARED_BYTES = 8 * (2 + CHOOSE_THREADS // 32)


def choose_best(logits: Tensor, ids: Tensor, best: Tensor) -> None:
    """Each row's largest logit [b v] to `best` [b], and its token to `ids` [b] int64; NaN is larger than all."""
    plain = logits.stride(1) == 1 and ids.is_contiguous() and best.is_contiguous()
    if logits.is_cuda and logits.dtype == torch.float32 and plain and _compiled(logits.device):
        chooser(logits.device, len(logits))(logits, logits.stride(0), logits.shape[1], ids, best)
    else:
        torch.max(logits, dim=-1, out=(best, ids))


def embedder(table: Tensor, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """ids [rows] int64 to their rows of `table` [v h], as hidden_dtype; None where the layer's own forward must do."""
    fits = table.is_contiguous() and table.shape[1] % 4 == 0 and table.data_ptr() % 16 == 0
    if table.device.type != "cuda" or not fits or table.dtype not in TYPES or hidden_dtype not in TYPES:
        return None
    return kernel_embedder(table, rows, hidden_dtype) if _compiled(table.device) else None


def kernel_embedder(table: Tensor, rows: int, hidden_dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """By embed.cu."""
    from statespan.ops.decode_step.launch import Launch

    hidden_size = table.shape[1]
    macros: dict[str, str | int] = {"W": TYPES[table.dtype], "H": TYPES[hidden_dtype], "INPUTS": hidden_size}
    launch = Launch("embed", table.device, (rows, -(-hidden_size // 1024)), 256, macros)

    def embed(ids: Tensor) -> Tensor:
        hidden = torch.empty(rows, hidden_size, dtype=hidden_dtype, device=table.device)
        launch(ids.to(torch.int64).contiguous(), table, hidden)
        return hidden

    return embed


def _compiled(device: torch.device) -> bool:
    return resolve("head_step", "auto", device, torch.float32) == "cuda"


@cache
def chooser(device: torch.device, rows: int) -> Callable[..., None]:
    """choose.cu for so many rows: (logits, stride of its rows, tokens of a row, ids, best)."""
    from statespan.ops.decode_step.launch import Launch, clusters

    blocks = CHOOSE_BLOCKS if clusters(device, CHOOSE_BLOCKS) else 1
    return Launch("choose", device, (rows, 1), CHOOSE_THREADS, {"SPLIT": blocks}, SHARED_BYTES, cluster=blocks)
