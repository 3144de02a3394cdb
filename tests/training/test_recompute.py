"""Activation checkpointing changes no value, keeps less, and leaves no trace."""

import copy
from dataclasses import replace

import pytest
import torch

from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.training.recompute import recomputing


def gradients(model: torch.nn.Module, enabled: bool, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and bytes that autograd keeps for the backward."""
    ids = torch.arange(40).view(2, 20)
    segments = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    kept = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        recomputing(model.layers, enabled),
    ):
        output = model(ids, segments=segments, labels=ids)
        loss = output.loss + output.aux_loss
    num_bytes = sum(kept.values())
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.item(), found, num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_bit_for_bit_with_less_kept(hybrid: ModelConfig, dtype: torch.dtype):
    model = build(replace(hybrid, layers=hybrid.layers * 2))
    plain, recomputed = gradients(model, False, dtype), gradients(model, True, dtype)
    assert plain[0] == recomputed[0]
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
        assert gradient.abs().sum() > 0, name
    assert recomputed[2] < plain[2] / 2


def test_leaves_no_trace(hybrid: ModelConfig):
    model = build(hybrid)
    names = list(model.state_dict())
    with recomputing(model.layers):
        assert list(model.state_dict()) == names
    assert all("forward" not in vars(block) for block in model.layers)
    with recomputing(model.layers, False, projections=1):
        assert not any(block.mixer.keep_projected for block in model.layers)
    with recomputing(model.layers, False, projections=0.5):
        kept = [block.mixer.keep_projected for block in model.layers]
    assert kept == sorted(kept) and sum(kept) == len(kept) - round(len(kept) / 2)
    with recomputing(model.layers, False, convolutions=0.5):
        assert [block.mixer.keep_convolved for block in model.layers] == kept
    with recomputing(model.layers, False, casts=0.5):
        assert [block.mixer.keep_cast for block in model.layers] == kept
    for mixer in (block.mixer for block in model.layers):
        assert (mixer.keep_projected, mixer.keep_convolved, mixer.keep_cast) == (True, False, False)
    copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError), recomputing(model.layers):
        _ = 1 / 0
    assert all("forward" not in vars(block) for block in model.layers)
