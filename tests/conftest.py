"""Fixtures that every test may use, and `--gpu`, which picks the tests of `make gpu-test`."""

import os
import re
import zlib
from collections.abc import Iterator

import pytest
import torch

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
