"""Fixtures that every test may use, and `--gpu`, which picks the tests of `make gpu-test`."""

import gc
import os
import re
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from statespan.layers.mixer import Mixer
from statespan.layers.norm import RMSNorm
from statespan.layers.state import SSMState
from statespan.models.verify_step import VerifyDecoder

# The tests run in several processes; two pools of OpenMP threads waiting for each other on one core cost far more than
# they give. Tests of the threads themselves ask for more.
torch.set_num_threads(1)

# The same examples each time, however long they take: a test fails where the code is wrong, not where the machine is
# busy. --hypothesis-profile=default looks for new ones.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

GPU_PARAMETERS = {("backend", "cuda"), ("backend", "triton"), ("device", "cuda")}
SERVING_MODELS = {"family", "hybrid", "window"}  # fixtures of the serving tests that lie on a GPU where there is one
# The slowest, 8 to 48 s on an H100 with nothing compiled: they start first, or the others would wait for them.
SLOW = re.compile(
    r"taps_and_lengths\[[5-8]|triton_sizes|says_what|any_schedule|without_graphs|captured|registered|"
    r"channels_and_dtypes|opcheck|one_graph|several_tokens|rows_equal|inner"
)
# Those that take much of the GPU's memory, and how much: one of a kind at a time.
LARGE = {re.compile("million|beyond_32|2_to_the_31"): 40 << 30, re.compile("losses_repeat"): 16 << 30}


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
    """Else in the order of a hash: neighbours need the same kernels, and would all compile them at the same time.

    The large ones come one after the other among the slow ones, so that none waits long for another.
    """
    if config.getoption("--gpu"):
        others = [item for item in items if not on_gpu(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if on_gpu(item)]
        items.sort(key=lambda item: (SLOW.search(item.nodeid) is None, zlib.crc32(item.nodeid.encode())))
        num_slow = sum(SLOW.search(item.nodeid) is not None for item in items)
        for pattern in LARGE:
            large = [item for item in items if pattern.search(item.nodeid)]
            items[:] = [item for item in items if item not in large]
            for place, item in enumerate(large):
                items.insert(place * num_slow // len(large), item)


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


@pytest.fixture(autouse=True)
def _large_tests_take_turns(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for those of a kind in other processes, and a while for the memory."""
    kind = next((kind for kind in LARGE if kind.search(request.node.nodeid)), None)
    if kind is None or not torch.cuda.is_available():
        yield
        return
    import fcntl  # not on every system

    with (Path(tempfile.gettempdir()) / f"statespan-{LARGE[kind]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wanted = min(LARGE[kind], torch.cuda.mem_get_info()[1] // 2)
        wait_until = time.monotonic() + 60
        while torch.cuda.mem_get_info()[0] < wanted and time.monotonic() < wait_until:
            time.sleep(0.1)
        yield
        gc.collect()
        torch.cuda.empty_cache()


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
