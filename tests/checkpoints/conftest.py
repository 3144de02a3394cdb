"""Tiny random models of transformers, saved to folders, and the comparison of logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel

VOCABULARY = 97


def randomise_weights(model: nn.Module) -> nn.Module:
    """Give every parameter a value that no initialisation has, with activations of ordinary size."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            uniform = torch.rand(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(2 * uniform)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(4 * uniform - 4)
            elif name.endswith(".D") or "norm" in name:
                parameter.copy_(1 + 0.3 * normal)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * normal)
            elif "conv1d" in name:
                parameter.copy_(0.5 * normal)
            else:
                parameter.copy_(normal / math.sqrt(parameter.shape[-1]))
    return model.eval()


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    return randomise_weights


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The transformers package, quiet and offline."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="session")
def build_random() -> Callable[[ModelConfig], LanguageModel]:
    """One of our models with random weights."""

    def build(config: ModelConfig) -> LanguageModel:
        return randomise_weights(LanguageModel(config))  # type: ignore[return-value]  # it returns what it was given

    return build


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Equal to 1e-4 of the largest value, in float32."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype == torch.float32
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"relative error {error:.2e}"

    return check


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(1))
