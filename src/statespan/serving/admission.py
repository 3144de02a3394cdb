"""Admission: what a request must be, and what memory it gets before it may start."""

import math
from bisect import insort
from collections.abc import Sequence

from statespan.models.language_model import LanguageModel
from statespan.serving.job import Job
from statespan.serving.options import EngineOptions
from statespan.serving.prefix_cache import PrefixCache
from statespan.serving.radix_tree import Match, Node, common_length
from statespan.serving.request import Request, RequestRefused
from statespan.serving.rows import Rows
from statespan.serving.scheduler import snapshot_places
from statespan.serving.snapshot import Snapshot

WORTH_WAITING = 16  # tokens that a snapshot of a prompt being absorbed must save


class Admission:
    """Admits a request when all the memory that it can come to need is there, so that nothing fails half-way.

    What only the prefix cache holds counts as free.

    Args:
        model: that is served.
        options: of the engine.
        rows: of its pool.
        cache: the prefix cache, if there is one.
        has_text: whether there is a tokenizer.
    """

    def __init__(
        self, model: LanguageModel, options: EngineOptions, rows: Rows, cache: PrefixCache | None, has_text: bool
    ) -> None:
        self.extra_tokens = 0  # of the decode step: room behind a row's last token
        self._vocab_size = model.config.vocab_size
        self._options, self._rows, self._pool, self._cache, self._has_text = options, rows, rows.pool, cache, has_text

    def check(self, request: Request) -> None:
        """RequestRefused for what can never be served."""
        options, vocab_size = request.options, self._vocab_size
        self.check_tokens(request.prompt)
        if not 1 <= request.num_samples <= self._rows.num_rows:
            raise RequestRefused(f"num_samples must be 1 to {self._rows.num_rows}, got {request.num_samples}")
        if options.return_state:
            raise RequestRefused("return_state is not for served requests; the prefix cache keeps their state")
        if options.stop_strings and not self._has_text:
            raise RequestRefused("stop strings need a tokenizer, and the model has none; use stop_token_ids")
        for token_id, bias in request.logit_bias.items():
            if not (0 <= token_id < vocab_size and math.isfinite(bias)):
                raise RequestRefused(f"logit_bias {{{token_id}: {bias}}} must be of a token below {vocab_size}, finite")
        have = self._pool.pages.num_pages - 1
        # A window's row holds few pages at once, but its place in the table is as long as all of them.
        wanted = max(self._pages_for(request), self._pool.pages_for(self.row_tokens(request)))
        if wanted > have:
            raise RequestRefused(
                f"{len(request.prompt)} prompt tokens and {options.max_new_tokens} new ones for {request.num_samples} "
                f"samples need {wanted} pages of {self._options.page_size} tokens; the engine has {have}"
            )

    def check_tokens(self, prompt: Sequence[int]) -> None:
        vocab_size = self._vocab_size
        if not prompt:
            raise RequestRefused("the prompt is empty; give at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise RequestRefused(
                f"token id {bad} of the prompt is out of range; the vocabulary is 0 to {vocab_size - 1}"
            )

    def row_tokens(self, request: Request) -> int:
        """Tokens that a row of the request has room for."""
        return len(request.prompt) + request.options.max_new_tokens + self.extra_tokens

    def _full_pages(self, num_tokens: int) -> int:
        """Pages that so many tokens fill, which another row can share for good: not so where a window moves on."""
        return 0 if self._pool.slides or not self._pool.pages_for(1) else num_tokens // self._options.page_size

    def _pages_of_forks(self, request: Request) -> int:
        """Pages that the samples after the first one take when they are forked."""
        each = self._rows.most_pages(self.row_tokens(request)) - self._full_pages(len(request.prompt) - 1)
        return (request.num_samples - 1) * each

    def _pages_for(self, request: Request, shared: int = 0) -> int:
        """Pages that a request takes which starts with so many of a snapshot."""
        return self._rows.most_pages(self.row_tokens(request)) - shared + self._pages_of_forks(request)

    def room(self, pages: int, keep: Node | None = None) -> bool:
        """Whether so many pages are free, or could be made so at the cost of other snapshots than `keep`'s."""
        pages += self._rows.pages_promised
        if self._cache is None or self._pool.pages.num_free >= pages:
            return self._pool.pages.num_free >= pages
        if self._pool.pages.num_free + self._cache.reclaimable(keep) < pages:
            return False
        return self._cache.free_pages(pages, keep)

    def awaits(self, job: Job) -> bool:
        """Whether a prompt that begins like the job's is being absorbed, and will leave a snapshot to go on from."""
        if self._cache is None or not job.request.reuse:
            return False
        leader = job.leader
        if leader is None or leader.row < 0 or leader.num_absorbed >= job.leader_at:
            job.leader = self._leader(job, self._cache)
        return job.leader is not None

    def _leader(self, job: Job, cache: PrefixCache) -> Job | None:
        """Who will get furthest along the job's prompt and is not there yet; told to take a snapshot there."""
        found, furthest = None, cache.match(job.tokens, len(job.tokens) - 1).num_tokens + WORTH_WAITING - 1
        for other in self._rows.prefilling:
            if not other.request.reuse or other.request.priority < job.request.priority:
                continue
            place = min(common_length(job.tokens, other.tokens), len(job.tokens) - 1, len(other.tokens) - 1)
            num_bytes = self._pool.row_bytes + self._pool.pages_seen(place) * self._pool.page_bytes
            if place > max(furthest, other.num_absorbed) and num_bytes <= cache.max_bytes:
                found, furthest = other, place
        if found is not None:
            job.leader_at, found.awaited_at = furthest, max(furthest, found.awaited_at)
            if furthest not in found.snapshots_at:
                insort(found.snapshots_at, furthest)
        return found

    def start(self, job: Job) -> bool:
        """Set a row to the longest known prefix of the prompt; False where there is no room yet."""
        request, limit = job.request, len(job.request.prompt) - 1
        cache = self._cache if request.reuse else None
        match = Match(None, 0) if cache is None else cache.match(request.prompt, limit)
        snapshot = None if cache is None or match.node is None else self._fetch(cache, match.node, request)
        if snapshot is None:
            match = Match(None, match.num_known)
            if not self.room(self._pages_for(request)):
                return False
        self._rows.begin(job, snapshot, self.row_tokens(request))
        job.start(match.num_tokens, self._pages_of_forks(request))
        if cache is not None:
            cache.count(len(request.prompt), match)
            interval = self._options.snapshot_interval
            job.snapshots_at = snapshot_places(match.num_tokens, limit, match.num_known, interval)
        return True

    def _fetch(self, cache: PrefixCache, node: Node, request: Request) -> Snapshot | None:
        """The snapshot of a node, with room for the request beside it; None where that cannot be."""
        own = self._pool.pages_seen(node.depth) if node.snapshot is None else 0  # to bring it back
        if not self.room(own + self._pages_for(request, self._full_pages(node.depth)), keep=node):
            return None
        return cache.fetch(node)
