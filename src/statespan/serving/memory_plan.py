"""MemoryPlan: how many rows and pages fit into the memory that the model leaves."""

from dataclasses import dataclass

import torch

from statespan.errors import UserError
from statespan.layers.moe import Int8Experts
from statespan.models.accounting import forward_bytes, kv_bytes_per_token, state_bytes
from statespan.models.language_model import LanguageModel
from statespan.ops.grouped_mlp.experts import WIDENED
from statespan.serving.pool_memory import padded_rows

CPU_BYTES = 1 << 30  # for keys and values where nothing is said
SHARE = 0.95  # of a GPU's free memory; the rest is what allocators and graphs leave between things


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by their use. `num_pages` counts page 0, which is nobody's."""

    free: int  # what there is to give away
    rows: int  # constant states of all rows
    cache: int  # the prefix cache's constant states
    working: int  # what a step's forward needs beside
    pages: int  # keys and values
    num_pages: int


def plan_memory(
    model: LanguageModel,
    *,
    num_rows: int,
    page_size: int,
    prefill_tokens: int,
    cache_bytes: int = 0,
    page_budget_bytes: int | None = None,
    draft: LanguageModel | None = None,
    num_drafts: int = 0,
) -> MemoryPlan:
    """Divide the memory that is free now.

    Args:
        model: that is served, in its place.
        num_rows: of the pool.
        page_size: tokens of a page.
        prefill_tokens: of one forward.
        cache_bytes: kept for snapshots.
        page_budget_bytes: for keys and values. None: on a GPU all that is left, elsewhere 1 GiB.
        draft: a model that drafts for it, in its place. It has as many pages.
        num_drafts: tokens drafted in a step; states are kept after each, and the draft model's before them too.

    Raises:
        UserError: on a GPU, where no page is left.

    Example:
        >>> import statespan
        >>> model = statespan.build("jamba-tiny", seed=0)
        >>> plan_memory(model, num_rows=8, page_size=16, prefill_tokens=512, page_budget_bytes=1 << 20).num_pages
        127
    """
    config, item = model.config, model.dtype.itemsize
    row, token = state_bytes(config, item), kv_bytes_per_token(config, item)
    if num_drafts and model.device.type == "cuda":
        row *= num_drafts + 2  # verifying keeps the state after each token
    if draft is not None:
        row += (num_drafts + 3) * state_bytes(draft.config, draft.dtype.itemsize)
        token += kv_bytes_per_token(draft.config, draft.dtype.itemsize)
    rows = padded_rows(num_rows, model.device) * row
    working = forward_bytes(config, prefill_tokens, item) + widened_bytes(model, prefill_tokens)
    # A page, and its place in the table of each row.
    page = page_size * token + 4 * padded_rows(num_rows, model.device)
    budget, free = page_budget_bytes, 0
    if model.device.type == "cuda":
        free = int(SHARE * _free_bytes(model.device))
        left = free - rows - working - cache_bytes
        budget = left if budget is None else min(budget, left)
    budget = CPU_BYTES if budget is None else budget
    free = free or rows + working + cache_bytes + budget
    if token == 0:
        return MemoryPlan(free, rows, cache_bytes, working, 0, 1)
    num_pages = budget // page
    if num_pages < 2 and model.device.type == "cuda":
        raise UserError(
            f"no memory is left for keys and values: of {free / 2**30:.1f} GiB free, {num_rows} rows take "
            f"{rows / 2**30:.1f}, a prefill of {prefill_tokens} tokens {working / 2**30:.1f} and the prefix cache "
            f"{cache_bytes / 2**30:.1f}; lower these, or quantize the model"
        )
    num_pages = max(2, num_pages)
    return MemoryPlan(free, rows, cache_bytes, working, num_pages * page, num_pages)


def widened_bytes(model: LanguageModel, num_tokens: int) -> int:
    """The copy of an int8 matrix of experts in the model's dtype that a GPU makes for so many tokens."""
    config = model.config.moe
    if model.dtype == torch.float32 or num_tokens * config.top_k // config.num_experts < WIDENED:
        return 0
    weights = [layer.up_proj.numel() for layer in model.modules() if isinstance(layer, Int8Experts)]
    return model.dtype.itemsize * max(weights, default=0)


def _free_bytes(device: torch.device) -> int:
    """What the driver and PyTorch's own allocator could give."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
