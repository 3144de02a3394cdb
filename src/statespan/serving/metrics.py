"""EngineMetrics: counters and gauges of one engine, as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def _counter(text: str) -> Any:
    return field(default=0, metadata={"text": text, "gauge": False})


def _gauge(text: str) -> Any:
    return field(default=0, metadata={"text": text, "gauge": True})


@dataclass(frozen=True)
class EngineMetrics:
    """Counters grow from the engine's start; gauges are of now. Each field's metadata says what it counts."""

    steps: int = _counter("Steps of the engine")
    requests: int = _counter("Requests submitted")
    finished: Mapping[str, int] = field(
        default_factory=dict[str, int], metadata={"text": "Replies that ended, by finish reason", "gauge": False}
    )
    prefill_tokens: int = _counter("Prompt tokens that went through the model")
    generated_tokens: int = _counter("New tokens")
    drafted_tokens: int = _counter("Tokens proposed by speculation")
    accepted_tokens: int = _counter("Proposed tokens that the model would have said itself")
    failures: int = _counter("Steps that raised")
    waiting: int = _gauge("Requests in the queue")
    prefilling: int = _gauge("Requests whose prompt is being absorbed")
    decoding: int = _gauge("Replies being generated")
    rows: int = _gauge("Rows of the pool: sequences that can run at once")
    pages_free: int = _gauge("Pages of keys and values that nobody holds")
    pages: int = _gauge("Pages of keys and values")
    cache_lookups: int = _counter("Requests that asked the prefix cache")
    cache_hits: int = _counter("Look-ups that found a snapshot")
    cache_reused_tokens: int = _counter("Prompt tokens that need not be prefilled")
    cache_known_tokens: int = _counter("Prompt tokens seen before, but with no snapshot there to start from")
    cache_prompt_tokens: int = _counter("Prompt tokens of all look-ups")
    cache_snapshots: int = _gauge("Snapshots in the model's memory")
    cache_bytes: int = _gauge("Bytes of the snapshots in the model's memory")
    cache_evictions: int = _counter("Snapshots that left the model's memory")
    spilled: int = _counter("Snapshots written to CPU memory or disk")
    spill_restored: int = _counter("Snapshots brought back")
    spill_dropped: int = _counter("Snapshot files that were damaged, foreign, or could not be written")
    spill_bytes: int = _gauge("Bytes of snapshots in CPU memory")
    spill_dir_bytes: int = _gauge("Bytes of snapshots on disk")

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
