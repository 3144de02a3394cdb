"""Fixtures that every test may use."""

import pytest
import torch

# The tests run in several processes; two pools of OpenMP threads waiting for each other on one core cost far more than
# they give. Tests of the threads themselves ask for more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
