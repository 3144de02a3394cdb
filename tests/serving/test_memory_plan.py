"""The plan's bytes against those of the pool that is built by it."""

import copy

import pytest
import torch

from statespan.errors import UserError
from statespan.models.language_model import LanguageModel
from statespan.models.quantize import quantize
from statespan.serving import memory_plan
from statespan.serving.memory_plan import plan_memory, widened_bytes
from statespan.serving.state_pool import StatePool


def test_the_pool_takes_what_was_planned(family: LanguageModel) -> None:
    plan = plan_memory(family, num_rows=5, page_size=4, prefill_tokens=64, page_budget_bytes=100_000)
    pool = StatePool(family, 5, plan.num_pages, 4)
    assert plan.rows == pool.row_bytes * pool._slabs.num_rows
    if pool.page_bytes == 0:
        assert plan.num_pages == 1
        return
    counters = 2 * 4 * pool._slabs.num_rows  # lengths, and who is active
    assert 0 <= plan.rows + plan.pages - (pool.num_bytes - counters) <= 4 * pool._slabs.num_rows
    one_more = plan.pages // plan.num_pages
    assert 100_000 - one_more < plan.pages <= 100_000


def test_a_gpu_gives_what_model_rows_cache_and_a_prefill_leave(
    hybrid: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "_free_bytes", lambda device: 2_000_000)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    sizes = {"num_rows": 3, "page_size": 4, "prefill_tokens": 256, "cache_bytes": 300_000}
    plan = plan_memory(hybrid, **sizes)
    assert plan.free == 1_900_000
    page = plan.pages // plan.num_pages
    assert plan.free - page < plan.rows + plan.cache + plan.working + plan.pages <= plan.free
    assert plan_memory(hybrid, **sizes, page_budget_bytes=50_000).pages <= 50_000
    with pytest.raises(UserError, match=r"no memory is left for keys and values: of 0\.0 GiB free, 3 rows take 0\.0"):
        plan_memory(hybrid, **sizes | {"cache_bytes": 2_000_000})


def test_the_copy_of_int8_experts_is_counted(hybrid: LanguageModel) -> None:
    """Two of four experts a token: 512 rows an expert are 1,024 tokens. An up_proj is [4, 2 x 24, 32]."""
    model = copy.deepcopy(hybrid).bfloat16()
    assert widened_bytes(model, 1 << 20) == 0
    quantize(model, "experts_int8")
    assert [widened_bytes(model, count) for count in (1023, 1024)] == [0, 2 * 4 * 2 * 24 * 32]
    sizes = {"num_rows": 3, "page_size": 4, "page_budget_bytes": 50_000}
    plans = [plan_memory(model, **sizes, prefill_tokens=count) for count in (1024, 2048)]
    assert plans[1].working == 2 * plans[0].working - 2 * 4 * 2 * 24 * 32
