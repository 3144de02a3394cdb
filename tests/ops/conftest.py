"""Fixtures of the ops' tests."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

GPU_BACKENDS = ("cuda", "triton")


@pytest.fixture(autouse=True)
def _device_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test whose parameter `backend` names one of a GPU makes its tensors there."""
    callspec = getattr(request.node, "callspec", None)
    on_gpu = callspec is not None and callspec.params.get("backend") in GPU_BACKENDS
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)
    if on_gpu:
        torch.cuda.empty_cache()  # other processes' tests want the memory too


@pytest.fixture
def room_for_large_tensors() -> Iterator[None]:
    """Waits where other processes run such tests too: each may take 40 GB of the GPU."""
    import fcntl  # not on every system

    seats = max(1, torch.cuda.get_device_properties(0).total_memory // (40 << 30)) if torch.cuda.is_available() else 1
    places = [Path(tempfile.gettempdir()) / f"statespan-large-{seat}.lock" for seat in range(seats)]
    files = [place.open("w") for place in places]

    def taken(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    while not any(map(taken, files)):  # the first that is free
        time.sleep(0.1)
    yield
    torch.cuda.empty_cache()
    for file in files:
        file.close()  # which gives the place back


@pytest.fixture
def nan_in_new_tensors() -> Iterator[None]:
    """Fills every new tensor with NaN, so that memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def values_and_gradients() -> Callable[..., Any]:
    """(function, inputs by name, segments, option) -> function's outputs, and every input's gradient by name.

    What is differentiated is a sum with random weights, the same in every call.
    """

    def run(
        function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Tensor], segments: Tensor | None, option: Any
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        outputs = function(segments, option, **leaves)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
        total = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
        found = torch.autograd.grad(total, list(leaves.values()))  # type: ignore[arg-type]  # a tensor
        return outputs, dict(zip(leaves, found, strict=True))

    return run
