"""Fixtures of the ops' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_in_new_tensors() -> Iterator[None]:
    """Fills every new tensor with NaN, so that memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
