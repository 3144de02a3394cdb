"""Many updates at once: against AdamW by hand, captured against the host, threads side by side against one alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from statespan.layers.config import AttentionConfig
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec, MixerName
from statespan.training import OptimizerConfig
from statespan.training.optimizer import build_optimizer
from statespan.training.updates import CapturedUpdates, Updates

RATES = [1e-2, 2e-2, 5e-3, 1e-2, 1e-3, 3e-3, 1e-2]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def fresh(mixer: MixerName = "mamba1", device: str = "cpu", seed: int = 0) -> LanguageModel:
    layers = (LayerSpec(mixer), LayerSpec(mixer))
    config = ModelConfig(vocab_size=11, hidden_size=32, layers=layers, attention=AttentionConfig(num_heads=2))
    return build(config, seed=seed, device=device).train()


def tokens(updates: int, length: int = 9, device: str = "cpu") -> Tensor:
    random = torch.Generator().manual_seed(length)
    return torch.randint(0, 11, (updates, 3, length), generator=random).to(device)


def made(model: LanguageModel, kind: type[Updates] = Updates, clip_norm: float | None = 0.5) -> Updates:
    def loss(input_ids: Tensor) -> Tensor:
        found = model(input_ids, labels=input_ids).loss
        assert found is not None  # labels were given
        return found

    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1.0, weight_decay=0.1))
    return kind(model, optimizer, loss, RATES, clip_norm)


def weights(model: LanguageModel) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_updates_are_those_of_adamw_by_hand() -> None:
    model, other = fresh(), fresh()
    ids = tokens(5)
    updates = made(model)
    losses = torch.cat([updates(ids[:3]), updates(ids[3:])])
    optimizer = build_optimizer(other, OptimizerConfig(learning_rate=1.0, weight_decay=0.1))
    for batch, rate, loss in zip(ids, RATES, losses, strict=False):
        found = other(batch, labels=batch).loss
        assert found is not None  # labels were given
        found.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(loss, found.detach())
    torch.testing.assert_close(weights(model), weights(other))


@on_gpu
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "attention", "s4d", "lstm"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_captured_updates_equal_those_of_the_host(mixer: MixerName, clip_norm: float | None) -> None:
    """Two lengths, so two graphs that share weights and the optimizer's state, and a call larger than the first."""
    by_host, captured = fresh(mixer, "cuda"), fresh(mixer, "cuda")
    pairs = made(by_host, clip_norm=clip_norm), made(captured, CapturedUpdates, clip_norm)
    batches = tokens(2, device="cuda"), tokens(1, 14, "cuda"), tokens(4, device="cuda")
    want, got = (torch.cat([updates(batch) for batch in batches]) for updates in pairs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(captured), weights(by_host), rtol=1e-3, atol=2e-4)


@on_gpu
def test_threads_side_by_side_train_as_one_alone() -> None:
    def train(seed: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            model = fresh(device="cuda", seed=seed)
            updates = made(model, CapturedUpdates)
            for batch in tokens(7, device="cuda").split((3, 3, 1)):
                updates(batch)
            return weights(model).cpu()

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    for seed, found in enumerate(together):
        torch.testing.assert_close(found, train(seed), rtol=1e-4, atol=1e-5)
