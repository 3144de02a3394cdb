"""Fixtures that every test may use, and `--gpu`, which picks the tests of `make gpu-test`."""

import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import Phase, settings

from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.state import SSMState
from statespan.models.verify_step import VerifyDecoder

# The tests run in several processes; two pools of OpenMP threads waiting for each other on one core cost far more than
# they give. Tests of the threads themselves ask for more.
torch.set_num_threads(1)

GPU_PARAMETERS = {("backend", "cuda"), ("backend", "triton"), ("device", "cuda")}
SERVING_MODELS = {"family", "hybrid"}  # fixtures of the serving tests that lie on a GPU where there is one
# The slowest, as they were on an H100 with nothing compiled: they start first, or the others would wait for them.
SLOW = re.compile("losses_repeat|says_what|captured|without_graphs|opcheck|registered|one_graph|million|beyond|inner")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="only the tests that run on a GPU, the slowest first")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a GPU where there is one")
    if config.getoption("--gpu"):  # a failing program of a serving test takes minutes to make small there
        settings.register_profile("gpu", phases=[Phase.explicit, Phase.reuse, Phase.generate])
        settings.load_profile("gpu")


def on_gpu(item: pytest.Function) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    models = SERVING_MODELS.intersection(item.fixturenames) if item.path.parent.name == "serving" else None
    return bool(
        item.get_closest_marker("gpu") or models or any(parameters.get(name) == value for name, value in GPU_PARAMETERS)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Else in the order of a hash: neighbours need the same kernels, and would all compile them at the same time."""
    if config.getoption("--gpu"):
        others = [item for item in items if not on_gpu(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if on_gpu(item)]
        items.sort(key=lambda item: (SLOW.search(item.nodeid) is None, zlib.crc32(item.nodeid.encode())))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_fault_ends_the_process(request: pytest.FixtureRequest) -> Iterator[None]:
    """After an illegal address every call of a process fails: with --gpu, pytest-xdist starts another one instead."""
    yield
    if request.config.getoption("--gpu") and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
        torch.cuda.empty_cache()  # other processes' tests want the memory too


@pytest.fixture
def room_for_large_tensors() -> Iterator[None]:
    """Waits where other processes run such tests too, and until the GPU has the 40 GB that each may take."""
    import fcntl  # not on every system

    large, on_gpu = 40 << 30, torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else large
    places = [Path(tempfile.gettempdir()) / f"statespan-large-{seat}.lock" for seat in range(max(1, total // large))]
    files = [place.open("w") for place in places]

    def taken(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    while not any(map(taken, files)):  # the first that is free
        time.sleep(0.1)
    wait_until = time.monotonic() + 60
    while on_gpu and torch.cuda.mem_get_info()[0] < large and time.monotonic() < wait_until:
        time.sleep(0.1)
    yield
    if on_gpu:
        torch.cuda.empty_cache()
    for file in files:
        file.close()  # which gives the place back


def _token_by_token(self: VerifyDecoder, layer: Mixer, norm: RMSNorm) -> Callable[..., torch.Tensor]:
    """What the kernels of a verify step do, by the layer's own forward."""
    rows, count = self._num_rows, self._num_tokens

    def step(hidden: torch.Tensor, window: torch.Tensor, state: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        windows, states = (tensor.view(count, rows, *tensor.shape[1:]) for tensor in kept)
        now, outputs = SSMState(window, state), list[torch.Tensor]()
        for place, token in enumerate(hidden.view(rows, count, -1).unbind(1)):
            mixed, now = layer(norm(token[:, None]), now)
            windows[place], states[place] = now.conv, now.ssm
            outputs.append(token + mixed[:, 0])
        return torch.stack(outputs, 1).flatten(0, 1)

    return step


@pytest.fixture
def kept_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are verified as on a GPU, with the state after each token kept: without one launch by launch."""
    if torch.cuda.is_available():
        return
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(VerifyDecoder, "captures", always, raising=False)
    monkeypatch.setattr(VerifyDecoder, "captured", lambda self, run: run)
    monkeypatch.setattr(VerifyDecoder, "_verify_step", _token_by_token)
    monkeypatch.setattr("statespan.models.verify_step.on_device", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
