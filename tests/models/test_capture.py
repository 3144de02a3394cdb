"""Captures, with graphs that record nothing: what fails is tried again, and threads take turns."""

import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statespan.models import prefill
from statespan.models.build import build
from statespan.models.capture import addresses, capturing
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec


class FakeGraph:
    """Replayable once a capture has ended well, as PyTorch's."""

    replays = 0
    whole = False

    def replay(self) -> None:
        assert self.whole, "Called CUDAGraph::replay without a preceding successful capture"
        self.replays += 1


class FakeCapture:
    """In place of torch.cuda.graph; two at once are an error, as on one stream."""

    running = 0

    def __init__(self, graph: FakeGraph, **_: Any) -> None:
        self._graph = graph

    def __enter__(self) -> None:
        assert FakeCapture.running == 0 and not gc.isenabled()
        FakeCapture.running += 1
        time.sleep(0.01)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        FakeCapture.running -= 1
        self._graph.whole = kind is None


@pytest.fixture(autouse=True)
def _fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)


def failing_once(run: Callable[[], Tensor], at: int) -> Callable[..., Tensor]:
    calls = []

    def step(*_: Any) -> Tensor:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError
        return run()

    return step


def test_threads_take_turns() -> None:
    found: list[str] = []

    def capture() -> None:
        try:
            with capturing(torch.cuda.CUDAGraph()):
                time.sleep(0.01)
        except AssertionError as error:
            found.append(str(error))

    threads = [threading.Thread(target=capture) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not found and gc.isenabled()


def test_collection_goes_on_after_a_capture_that_failed() -> None:
    with pytest.raises(torch.OutOfMemoryError), capturing(torch.cuda.CUDAGraph()):
        raise torch.OutOfMemoryError
    assert gc.isenabled()


def test_a_step_is_captured_again_where_that_failed() -> None:
    config = ModelConfig(vocab_size=61, hidden_size=16, layers=(LayerSpec("mamba1"),))
    decoder = build(config, seed=0).eval().decoder(1)
    decoder.captures = True
    run = decoder.captured(failing_once(lambda: torch.zeros(1, 61), at=2))
    run()  # as it is
    with pytest.raises(torch.OutOfMemoryError):
        run()
    assert not decoder.capturing
    for _ in range(3):
        run()
    assert vars(run)["_graph"].replays == 3


def test_a_chunk_is_captured_again_where_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    run = failing_once(lambda: torch.zeros(1, 1, 8), at=2)
    chunk = prefill._Chunk(SimpleNamespace(device=torch.device("cpu"), pool=None, run=run), 1, 64, False)  # type: ignore[reportArgumentType]  # all that it asks of a Prefiller
    ids = torch.zeros(1, 64, dtype=torch.int64)
    chunk(ids, None)
    with pytest.raises(torch.OutOfMemoryError):
        chunk(ids, None)
    for _ in range(3):
        chunk(ids, None)
    assert vars(chunk)["_graph"].replays == 3


def test_addresses_are_those_of_all_weights_and_buffers() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleList([nn.Linear(3, 1, bias=False)]))
    tensors = (*module.parameters(), *module.buffers())
    before = addresses(module)
    assert sorted(before) == sorted(tensor.data_ptr() for tensor in tensors)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert addresses(module) == before
    module[0].weight.data = module[0].weight.detach().clone()
    assert addresses(module) != before
