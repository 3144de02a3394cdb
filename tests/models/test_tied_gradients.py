"""A tied head's gradient with the embedding's rows added where it lies, as on a GPU; the kernel is emulated."""

import copy
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statespan.layers.config import Mamba1Config
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.language_model import LanguageModel
from statespan.models.layer_pattern import LayerSpec
from statespan.ops import tied_embedding

IDS = torch.tensor([[3, 1, 3, 3, 7, 60], [0, 3, 5, 5, 5, 2]])


def small(**changes: Any) -> LanguageModel:
    config = ModelConfig(
        vocab_size=61,
        vocab_multiple=8,  # three rows are padding
        hidden_size=16,
        layers=(LayerSpec("mamba1"), LayerSpec("mamba1")),
        mamba1=Mamba1Config(state_size=4),
        **{"tie_embeddings": True, **changes},
    )
    return build(config, seed=0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the CPU has the kernel: how many rows each of its calls adds."""
    found = list[int]()

    def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
        found.append(len(ids))
        total.index_add_(0, ids, rows)

    kernels = SimpleNamespace(why_not=lambda device, dtypes: None)
    monkeypatch.setattr(tied_embedding, "BACKENDS", {"triton": kernels})
    monkeypatch.setitem(sys.modules, "statespan.ops.triton_kernels.weights", SimpleNamespace(add_rows=add_rows))
    return found


def loss_of(model: LanguageModel, ids: Tensor = IDS) -> Tensor:
    loss = model(ids, labels=ids).loss
    assert loss is not None  # labels were given
    return loss


def accumulated(model: LanguageModel) -> None:
    for part in (IDS[:1], IDS[1:], IDS[:, :2]):
        loss_of(model, part).backward()


def used_twice(model: LanguageModel) -> None:
    (loss_of(model) + 2 * loss_of(model, IDS[:, 2:])).backward()


def checkpointed(model: LanguageModel) -> None:
    checkpoint(loss_of, model, use_reentrant=False).backward()


def copied(model: LanguageModel) -> None:
    loss_of(model).backward()
    copy.deepcopy(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    loss_of(model).backward()


def in_bfloat16(model: LanguageModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()


def with_a_parametrized_block(model: LanguageModel) -> None:
    nn.utils.parametrize.register_parametrization(model.layers[0].mixer.in_proj, "weight", nn.Identity())
    loss_of(model).backward()


def functional(model: LanguageModel) -> None:
    twice = {name: 2 * parameter for name, parameter in model.named_parameters()}
    output = torch.func.functional_call(model, twice, (IDS,), {"labels": IDS})
    output.loss.backward()


WAYS = [accumulated, used_twice, checkpointed, copied, in_bfloat16, with_a_parametrized_block, functional]


@pytest.mark.parametrize("train", WAYS)
def test_gradients_are_those_of_a_lookup(
    train: Callable[[LanguageModel], None], request: pytest.FixtureRequest
) -> None:
    plain, tied = small(), small()
    train(plain)
    calls = request.getfixturevalue("calls")
    train(tied)
    assert calls
    found, expected = ([parameter.grad for parameter in model.parameters()] for model in (tied, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_frozen_matrix_gets_no_gradient(calls: list[int]) -> None:
    model = small()
    model.embedding.weight.requires_grad_(False)
    loss_of(model).backward()
    assert model.embedding.weight.grad is None and not calls


@pytest.mark.parametrize("model", [small(), small(tie_embeddings=False)], ids=["tied", "untied"])
def test_only_a_tied_head_takes_the_rows(model: LanguageModel, calls: list[int]) -> None:
    loss_of(model).backward()
    assert calls == ([12] if model.lm_head is None else [])


class Watched(nn.Embedding):
    """A class of its own."""


class Labelled(Tensor):
    """A tensor with more than an address."""


def with_weight_of_a_class(model: LanguageModel) -> None:
    model.embedding.weight = nn.Parameter(model.embedding.weight.detach().as_subclass(Labelled))


def replaced(model: LanguageModel) -> None:
    old, model.embedding = model.embedding, Watched(64, 16)
    model.embedding.weight = old.weight


CHANGES: dict[str, Callable[[LanguageModel, list[int]], Any]] = {
    "a forward hook": lambda m, seen: m.embedding.register_forward_hook(lambda *_: seen.append(1)),
    "a forward pre-hook": lambda m, seen: m.embedding.register_forward_pre_hook(lambda *_: seen.append(1)),
    "a backward hook": lambda m, seen: m.embedding.register_full_backward_hook(lambda *_: seen.append(1)),
    "a backward pre-hook": lambda m, seen: m.embedding.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "another forward": lambda m, seen: setattr(
        m.embedding, "forward", lambda ids: seen.append(1) or nn.functional.embedding(ids, m.embedding.weight)
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # no input of an embedding has gradients
@pytest.mark.parametrize("name", CHANGES)
def test_who_looks_at_the_embedding_sees_it_called(name: str, calls: list[int]) -> None:
    model, seen = small(), list[int]()
    CHANGES[name](model, seen)
    loss_of(model).backward()
    assert seen == [1] and not calls


@pytest.fixture
def seen_by_all() -> Iterator[list[str]]:
    """The modules that a hook of all modules sees."""
    seen = list[str]()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    yield seen
    handle.remove()


def test_hooks_of_all_modules_see_it(calls: list[int], seen_by_all: list[str]) -> None:
    loss_of(small()).backward()
    assert "Embedding" in seen_by_all and not calls


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.embedding, "padding_idx", 3),
        lambda model: setattr(model.embedding, "max_norm", 0.01),
        lambda model: setattr(model.embedding, "scale_grad_by_freq", True),
        lambda model: setattr(model.embedding, "sparse", True),
        with_weight_of_a_class,
        replaced,
    ],
    ids=["padding_idx", "max_norm", "scale_grad_by_freq", "sparse", "subclass", "module"],
)
def test_what_else_an_embedding_does_is_obeyed(change: Callable[[LanguageModel], None], calls: list[int]) -> None:
    model = small()
    change(model)
    loss_of(model).backward()
    assert not calls
