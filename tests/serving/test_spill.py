"""Snapshots outside the model's memory: what comes back is what went, or nothing."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.serving import spill
from statespan.serving.prefix_cache import PrefixCache
from statespan.serving.runner import Chunk, Runner
from statespan.serving.spill import SpillStore, model_identity
from statespan.serving.state_pool import StatePool


def tensors(seed: int, size: int = 250) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"state": torch.randn(size, generator=generator), "pages": torch.ones(3, 5, dtype=torch.bfloat16)}


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def given_back(num_tokens: int, found: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    return num_tokens, found


SIZE = 250 * 4 + 15 * 2


def test_in_memory_the_least_recent_leaves() -> None:
    store, dropped = SpillStore("m", 2 * SIZE), []
    store.on_drop = dropped.append
    first, second = store.put(tokens(1), tensors(1)), store.put(tokens(2), tensors(2))
    assert store.load(first, given_back)[1]["state"].equal(tensors(1)["state"])
    third = store.put(tokens(3), tensors(3))
    assert dropped == [second] and store.memory_bytes == 2 * SIZE
    assert store.entries() == [first, third]
    assert store.put(tokens(4), tensors(4, 10_000)) is None
    store.close()


def test_files_are_found_after_a_restart(tmp_path: Path) -> None:
    store = SpillStore("m", SIZE, tmp_path, 1 << 20)
    for seed in (1, 2, 3):
        store.put(tokens(seed, 7, 300 + seed), tensors(seed))
    assert store.memory_bytes == SIZE
    store.close()
    again = SpillStore("m", SIZE, tmp_path, 1 << 20)
    found = {tuple(spilled.tokens.tolist()): spilled for spilled in again.entries()}
    assert set(found) == {(1, 7, 301), (2, 7, 302), (3, 7, 303)}
    for seed in (1, 2, 3):
        count, values = again.load(found[seed, 7, 300 + seed], given_back)
        assert count == 3 and set(values) == {"state", "pages"}
        assert all(values[name].equal(tensor) for name, tensor in tensors(seed).items())
    assert again.counts["spill_dropped"] == 0
    again.close()


def test_the_folder_has_a_limit_too(tmp_path: Path) -> None:
    store = SpillStore("m", 0, tmp_path, 4 * SIZE)
    for seed in range(9):
        store.put(tokens(seed), tensors(seed))
    store.close()
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(store.entries()) == 4
    assert [int(spilled.tokens[0]) for spilled in store.entries()] == [5, 6, 7, 8]
    smaller = SpillStore("m", 0, tmp_path, 3 * SIZE)  # files are a little larger than their tensors
    assert len(smaller.entries()) == 2
    smaller.close()


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    place = data.index(tensors(1)["state"].numpy().tobytes()) + 100
    data[place] ^= 4
    file.write_bytes(data)


def of_another_model(file: Path) -> None:
    data = file.read_bytes()
    assert b'"identity":"m"' in data
    file.write_bytes(data.replace(b'"identity":"m"', b'"identity":"n"'))


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut_short, empty, flip_a_bit, of_another_model, remove])
@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "between two runs"])
def test_a_damaged_file_is_dropped(tmp_path: Path, damage: Callable[[Path], None], running: bool) -> None:
    store = SpillStore("m", 0, tmp_path, 1 << 20)
    store.put(tokens(1), tensors(1))
    store.put(tokens(2), tensors(2))
    store.close()
    files = {int(spilled.tokens[0]): spilled.file for spilled in store.entries()}
    if running:
        again = SpillStore("m", 0, tmp_path, 1 << 20)
        damage(files[1])
    else:
        damage(files[1])
        again = SpillStore("m", 0, tmp_path, 1 << 20)
    dropped = []
    again.on_drop = dropped.append
    results = {int(spilled.tokens[0]): again.load(spilled, given_back) for spilled in again.entries()}
    assert results.pop(1, None) is None
    assert results[2][1]["state"].equal(tensors(2)["state"])
    assert len(again.entries()) == 1
    assert again.counts["spill_dropped"] == (0 if damage is remove and not running else 1)
    again.close()
    assert not files[1].exists() and files[2].exists()


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    old, new = tmp_path / "m" / "a.1.part", tmp_path / "m" / "b.2.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 3600,) * 2)
    SpillStore("m", 0, tmp_path, 1 << 20).close()
    assert not old.exists() and new.exists()  # another process may be writing the new one


def test_a_full_disk_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
        file.write_bytes(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "save_file", full)
    store, dropped = SpillStore("m", SIZE, tmp_path, 1 << 20), []
    store.on_drop = dropped.append
    first = store.put(tokens(1), tensors(1))
    kept = store.put(tokens(2), tensors(2))
    first.writing and first.writing.exception()
    store.put(tokens(3), tensors(3))
    assert first in dropped and kept not in dropped[:1]
    store.close()
    assert store.counts["spill_dropped"] == 3 and store.entries() == []
    assert list(tmp_path.rglob("*.*")) == []


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep snapshots there"):
        SpillStore("m", 0, tmp_path / "file", 1)


def test_the_identity_tells_models_apart(hybrid: LanguageModel) -> None:
    identity = model_identity(hybrid, 16)
    assert model_identity(hybrid, 16) == identity and len(identity) == 16
    assert model_identity(hybrid, 8) != identity
    weight = hybrid.layers[1].mixer.out_proj.weight
    with torch.no_grad():
        before = weight[0, 0].clone()
        weight[0, 0] += 1e-3
        assert model_identity(hybrid, 16) != identity
        weight[0, 0] = before
    assert model_identity(hybrid, 16) == identity


def test_through_the_prefix_cache(hybrid: LanguageModel, tmp_path: Path) -> None:
    """A snapshot that left memory, and another process's, continue as if nothing had happened."""
    prompt = (3, 1, 4, 1, 5, 9, 2, 6, 5)

    def cache_of(pool: StatePool) -> PrefixCache:
        return PrefixCache(pool, 1 << 20, SpillStore(model_identity(hybrid, 4), 1 << 20, tmp_path, 1 << 20))

    def continued(pool: StatePool, cache: PrefixCache) -> Tensor:
        match = cache.match((*prompt, 8), len(prompt))
        assert match.num_tokens == len(prompt)
        snapshot = cache.fetch(match.node)
        pool.restore(1, snapshot)
        logits = Runner(hybrid, pool).prefill([Chunk(1, (8,))])
        pool.clear(1)
        cache.check()
        return logits

    pool = StatePool(hybrid, 2, 20, 4)
    cache = cache_of(pool)
    Runner(hybrid, pool).prefill([Chunk(0, prompt)])
    cache.insert(prompt, pool.snapshot(0))
    pool.clear(0)
    with torch.no_grad():
        expected = hybrid(torch.tensor([[*prompt, 8]], device=hybrid.device)).logits[:, -1]
    assert cache.free_pages(19) and len(cache) == 0
    torch.testing.assert_close(continued(pool, cache), expected, atol=1e-5, rtol=1e-5)
    assert cache.counts["spill_restored"] == 1 and cache.spill.counts["spilled"] == 1
    cache.close()
    assert pool.pages.num_free == 19

    pool = StatePool(hybrid, 2, 20, 4)
    cache = cache_of(pool)
    torch.testing.assert_close(continued(pool, cache), expected, atol=1e-5, rtol=1e-5)
    cache.close()


def test_a_damaged_snapshot_leaves_the_tree(hybrid: LanguageModel, tmp_path: Path) -> None:
    pool = StatePool(hybrid, 2, 20, 4)
    store = SpillStore("m", 0, tmp_path, 1 << 20)
    cache = PrefixCache(pool, 1 << 20, store)
    Runner(hybrid, pool).prefill([Chunk(0, (1, 2, 3))])
    cache.insert((1, 2, 3), pool.snapshot(0))
    pool.clear(0)
    cache.free_pages(19)
    (spilled,) = store.entries()
    if spilled.writing is not None:  # it may be done, and noted
        spilled.writing.result()
    store.put(tokens(9), tensors(1))  # notes that the first one is on the disk
    cut_short(spilled.file)
    match = cache.match((1, 2, 3, 4), 3)
    assert match.num_tokens == 3 and cache.fetch(match.node) is None
    assert cache.match((1, 2, 3, 4), 3).num_tokens == 0
    cache.check()
    cache.close()
