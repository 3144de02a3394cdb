"""EngineOptions: how much memory the engine may use, and how it shares its steps."""

from dataclasses import dataclass
from pathlib import Path

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.serving.memory_plan import plan_memory


@dataclass(frozen=True)
class EngineOptions:
    """Limits of one engine. Sizes are bytes, tokens, rows or pages as the names say."""

    max_rows: int = 64  # sequences that run at once; each holds a row of the state pool
    page_size: int = 16  # tokens of keys and values that a page holds
    num_pages: int | None = None  # None: what fits in the memory that is left, see page_budget_bytes
    page_budget_bytes: int | None = None  # for pages; None: most of a GPU's free memory, 1 GiB on the CPU
    max_waiting: int = 2048  # requests in the queue; more raise QueueFull
    prefill_tokens: int = 2048  # prompt tokens a step, all requests together
    longest_waiting_share: float = 0.25  # of prefill_tokens, for the request that has waited longest
    num_drafts: int = 0  # tokens a row and step that speculation proposes, by prompt look-up or a draft model; 0: none
    cache_bytes: int = 1 << 30  # of the prefix cache, in the model's memory; 0: none
    snapshot_interval: int = 512  # tokens to the first snapshot inside a long prompt; then at twice the distance each
    spill_bytes: int = 0  # CPU memory for snapshots that left the prefix cache
    spill_dir: Path | None = None  # where they go after that, and are found again after a restart
    spill_dir_bytes: int = 16 << 30  # of its files

    def __post_init__(self) -> None:
        for name, least in (
            ("max_rows", 1),
            ("page_size", 1),
            ("num_pages", 2),
            ("page_budget_bytes", 0),
            ("max_waiting", 1),
            ("prefill_tokens", 1),
            ("num_drafts", 0),
            ("cache_bytes", 0),
            ("snapshot_interval", 1),
            ("spill_bytes", 0),
            ("spill_dir_bytes", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"EngineOptions.{name} must be at least {least}, got {value}")
        if not 0 < self.longest_waiting_share <= 1:
            raise UserError(
                f"EngineOptions.longest_waiting_share must be above 0 and at most 1, got {self.longest_waiting_share}"
            )


def num_pages(model: LanguageModel, options: EngineOptions, draft: LanguageModel | None = None) -> int:
    """Pages of the pool: as many as were asked for, or fit in the memory for them."""
    if options.num_pages is not None:
        return options.num_pages
    return plan_memory(
        model,
        num_rows=options.max_rows + 1,
        page_size=options.page_size,
        prefill_tokens=options.prefill_tokens,
        cache_bytes=options.cache_bytes,
        page_budget_bytes=options.page_budget_bytes,
        draft=draft,
        num_drafts=options.num_drafts,
    ).num_pages
