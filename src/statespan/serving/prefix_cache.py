"""PrefixCache: snapshots by the tokens that they have absorbed; the least recently used leave first."""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from statespan.models.language_model import LanguageModel
from statespan.serving.options import EngineOptions
from statespan.serving.radix_tree import Match, Node, RadixTree, Tokens
from statespan.serving.snapshot import Snapshot
from statespan.serving.spill import Spilled, SpillStore, model_identity
from statespan.serving.state_pool import StatePool


class PrefixCache:
    """Snapshots of `pool` by the tokens they have absorbed, `max_bytes` of them; others go to `spill`, if there is one.

    Bytes are the snapshots' states and the pages that at least one of them holds, each counted once.
    """

    def __init__(self, pool: StatePool, max_bytes: int, spill: SpillStore | None = None) -> None:
        self.pool, self.max_bytes, self.spill = pool, max_bytes, spill
        self.counts: Counter[str] = Counter()  # of EngineMetrics
        self._tree = RadixTree()
        self._recent: OrderedDict[Node, None] = OrderedDict()  # those with a snapshot in memory, least recent first
        self._holds: Counter[int] = Counter()  # page: snapshots of the tree that hold it
        self._state_bytes = 0
        self._node_of: dict[Spilled, Node] = {}
        if spill is not None:
            spill.on_drop = self._forget
            for spilled in spill.entries():
                self._keep_spilled(self._tree.grow(spilled.tokens), spilled)

    def __len__(self) -> int:
        """Snapshots in memory."""
        return len(self._recent)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self._state_bytes + len(self._holds) * self.pool.page_bytes

    def match(self, prompt: Sequence[int] | Tokens, limit: int) -> Match:
        """What is known of the first `limit` tokens of a prompt. A node that is found counts as just used."""
        found = self._tree.match(np.asarray(prompt[:limit], np.int32))
        if found.node is not None:
            self._touch(found.node)
        return found

    def count(self, prompt_tokens: int, match: Match) -> None:
        """Note a look-up that a request was admitted with."""
        self.counts["cache_lookups"] += 1
        self.counts["cache_hits"] += match.num_tokens > 0
        self.counts["cache_prompt_tokens"] += prompt_tokens
        self.counts["cache_reused_tokens"] += match.num_tokens
        self.counts["cache_known_tokens"] += match.num_known - match.num_tokens

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot in memory after exactly these tokens."""
        node = self._tree.find(np.asarray(tokens, np.int32))
        return node is not None and node.snapshot is not None

    def insert(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Own `snapshot`, taken after `tokens`; what is least recent leaves if there is no room."""
        if snapshot.num_bytes > self.max_bytes:
            self.pool.release(snapshot)
            return
        self._keep(self._tree.grow(np.asarray(tokens, np.int32)), snapshot)
        self._shrink()

    def fetch(self, node: Node) -> Snapshot | None:
        """The snapshot of a node, brought back if it was spilled; None where it is too large or its file damaged.

        The pool must have free pages for it.
        """
        spilled = node.spilled
        if node.snapshot is None and spilled is not None and self.spill is not None:
            if spilled.num_bytes > self.max_bytes:
                return None
            snapshot = self.spill.load(spilled, self.pool.from_host)
            if snapshot is None:
                return None
            self.counts["spill_restored"] += 1
            self._keep(node, snapshot)
            self._shrink(keep=node)
        return node.snapshot

    def reclaimable(self, keep: Node | None = None) -> int:
        """Pages that would be free if all snapshots but that of `keep` left."""
        kept = set(keep.snapshot.pages) if keep is not None and keep.snapshot is not None else set[int]()
        holders = self.pool.pages.holders
        return sum(1 for page, count in self._holds.items() if page not in kept and holders(page) == count)

    def free_pages(self, count: int, keep: Node | None = None) -> bool:
        """Make `count` pages free, at the cost of the least recent snapshots; whether that worked."""
        while self.pool.pages.num_free < count and self._evict_oldest(keep):
            pass
        return self.pool.pages.num_free >= count

    def close(self) -> None:
        """Let go of all snapshots; with a folder to spill to they are found there after a restart."""
        for node in list(self._recent):
            self._evict(node)
        if self.spill is not None:
            self.spill.close()

    def nodes(self) -> Iterator[Node]:
        """All nodes that own a snapshot, or branch."""
        return iter(self._tree)

    def check(self) -> None:
        """Raise AssertionError where the tree's books are wrong."""
        self._tree.check()
        nodes = list(self._tree)
        held: Counter[int] = Counter()
        for node in nodes:
            assert (node in self._recent) == (node.snapshot is not None)
            if node.snapshot is not None:
                assert node.snapshot.num_tokens == node.depth
                held.update(set(node.snapshot.pages))
        assert held == self._holds
        assert len(self._recent) == sum(node.snapshot is not None for node in nodes)
        assert {node.spilled for node in nodes if node.spilled is not None} == set(self._node_of)
        states = sum(self._bytes_of(node.snapshot) for node in nodes if node.snapshot is not None)
        assert states == self._state_bytes and self.num_bytes <= max(self.max_bytes, 0)

    def _keep(self, node: Node, snapshot: Snapshot) -> None:
        if node.snapshot is not None:  # the one that is there is as good
            self.pool.release(snapshot)
        else:
            node.snapshot = snapshot
            self._holds.update(set(snapshot.pages))
            self._state_bytes += self._bytes_of(snapshot)
            self._recent[node] = None
        self._touch(node)

    def _touch(self, node: Node) -> None:
        if node.snapshot is not None:
            self._recent.move_to_end(node)

    def _bytes_of(self, snapshot: Snapshot) -> int:
        """Without the pages, which may be shared."""
        return snapshot.num_bytes - len(snapshot.pages) * self.pool.page_bytes

    def _shrink(self, keep: Node | None = None) -> None:
        while self.num_bytes > self.max_bytes and self._evict_oldest(keep):
            pass

    def _evict_oldest(self, keep: Node | None) -> bool:
        """Whether there was one besides `keep`."""
        node = next((node for node in self._recent if node is not keep), None)
        if node is not None:
            self._evict(node)
        return node is not None

    def _evict(self, node: Node) -> None:
        """Let the snapshot of a node go out of memory."""
        snapshot = node.snapshot
        assert snapshot is not None  # who is in _recent has one
        if self.spill is not None and node.spilled is None:
            spilled = self.spill.put(node.path, self.pool.to_host(snapshot))
            if spilled is not None:
                self._keep_spilled(node, spilled)
        node.snapshot = None  # not before: what the store dropped for this one must not take the node with it
        del self._recent[node]
        for page in set(snapshot.pages):
            self._holds[page] -= 1
            if not self._holds[page]:
                del self._holds[page]
        self._state_bytes -= self._bytes_of(snapshot)
        self.pool.release(snapshot)
        self.counts["cache_evictions"] += 1
        self._tree.prune(node)

    def _keep_spilled(self, node: Node, spilled: Spilled) -> None:
        node.spilled = spilled
        self._node_of[spilled] = node

    def _forget(self, spilled: Spilled) -> None:
        """The store dropped it."""
        node = self._node_of.pop(spilled, None)
        if node is not None:
            node.spilled = None
            self._tree.prune(node)


def prefix_cache_of(model: LanguageModel, pool: StatePool, options: EngineOptions) -> PrefixCache | None:
    """The prefix cache that an engine's options ask for, with the store that it spills to."""
    if options.cache_bytes == 0:
        return None
    spill = None
    if options.spill_bytes or options.spill_dir is not None:
        identity = model_identity(model, options.page_size)
        spill = SpillStore(identity, options.spill_bytes, options.spill_dir, options.spill_dir_bytes)
    return PrefixCache(pool, options.cache_bytes, spill)
