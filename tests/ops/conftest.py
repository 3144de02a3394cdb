"""Fixtures of the ops' tests."""

from collections.abc import Iterator

import pytest
import torch

GPU_BACKENDS = ("cuda", "triton")


@pytest.fixture(autouse=True)
def _device_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose parameter `backend` names one of a GPU makes its tensors there."""
    callspec = getattr(request.node, "callspec", None)
    on_gpu = callspec is not None and callspec.params.get("backend") in GPU_BACKENDS
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def nan_in_new_tensors() -> Iterator[None]:
    """Fills every new tensor with NaN, so that memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
