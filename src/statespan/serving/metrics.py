"""EngineMetrics: counters and gauges of one engine, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineMetrics:
    """Counters grow from the engine's start; gauges, named so, are of now."""

    steps: int = 0
    requests: int = 0  # submitted
    finished: Mapping[str, int] = field(default_factory=dict[str, int])  # samples by finish reason
    prefill_tokens: int = 0  # prompt tokens that went through the model
    generated_tokens: int = 0
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of these, those that the model would have said itself
    failures: int = 0  # steps that raised
    waiting: int = 0  # gauge: requests in the queue
    prefilling: int = 0  # gauge: requests
    decoding: int = 0  # gauge: rows
    rows: int = 0  # gauge: rows of the pool
    pages_free: int = 0  # gauge
    pages: int = 0  # gauge: pages of the pool
    cache_lookups: int = 0
    cache_hits: int = 0  # lookups that found a snapshot
    cache_reused_tokens: int = 0  # prompt tokens that need not be prefilled
    cache_known_tokens: int = 0  # prompt tokens that the cache had seen, but with no snapshot there to start from
    cache_prompt_tokens: int = 0  # of all lookups
    cache_snapshots: int = 0  # gauge: in the model's memory
    cache_bytes: int = 0  # gauge: of these
    cache_evictions: int = 0  # snapshots that left the model's memory
    spilled: int = 0  # snapshots written to CPU memory or disk
    spill_restored: int = 0  # snapshots brought back
    spill_dropped: int = 0  # files that were damaged, foreign, or could not be written
    spill_bytes: int = 0  # gauge: in CPU memory
    spill_dir_bytes: int = 0  # gauge: on disk

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompt tokens that were reused; 0 before the first request."""
        return self.cache_reused_tokens / max(1, self.cache_prompt_tokens)

    @property
    def cache_summary(self) -> str:
        """One line that says how well the prefix cache works, and why not where it does not."""
        if not self.cache_lookups:
            return "prefix cache: no look-ups yet"
        line = (
            f"prefix cache: {self.cache_hits} of {self.cache_lookups} requests hit, "
            f"{self.cache_hit_rate:.0%} of {self.cache_prompt_tokens:,} prompt tokens reused"
        )
        if self.cache_known_tokens:
            line += (
                f"; {self.cache_known_tokens:,} more tokens were known without a snapshot to start from "
                f"({self.cache_evictions} snapshots evicted; raise cache_bytes if that is many)"
            )
        elif not self.cache_hits:
            line += "; no prompt began like an earlier one"
        return line
