import sys

import pytest
import torch

import statespan
from statespan.checkpoints import checkpoint
from statespan.errors import CheckpointError, UserError
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig
from statespan.layers.linear import Int4Linear, Int8Linear, Linear, int4_group_size
from statespan.layers.moe import Int8Experts
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.quantize import MODES, is_quantized, quantize, quantized_weights, weight_bytes

HYBRID = ModelConfig(
    vocab_size=61,
    vocab_multiple=8,
    hidden_size=64,
    layers=tuple(map(LayerSpec.from_text, ("mamba1+mlp", "attention+moe", "mamba2+moe"))),
    mamba1=Mamba1Config(state_size=5, inner_norms=True),
    mamba2=Mamba2Config(head_dim=16, state_size=6),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, qkv_bias=True),
    mlp=MLPConfig(intermediate_size=40),
    moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=24, bias=True),
)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def hybrid(tied: bool = True) -> statespan.LanguageModel:
    model = statespan.build(HYBRID.replace(tie_embeddings=tied), seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "dt_bias" not in name:
                parameter.uniform_(-0.5, 0.5)
    return model


def logits(model: statespan.LanguageModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def kinds(model: statespan.LanguageModel) -> dict[str, int]:
    return {
        kind.__name__: sum(type(module) is kind for module in model.modules())
        for kind in (Linear, Int8Linear, Int4Linear, Int8Experts)
    }


def test_which_layers_become_what():
    # mamba1: in, x, dt, out; mamba2: in, out; attention: 2; mlp: 2. Rows of 40 and of dt's rank 4 have no groups.
    assert kinds(quantize(hybrid(), "int8")) == {"Linear": 0, "Int8Linear": 11, "Int4Linear": 0, "Int8Experts": 2}
    assert kinds(quantize(hybrid(), "experts_int8")) == {
        "Linear": 10,
        "Int8Linear": 0,
        "Int4Linear": 0,
        "Int8Experts": 2,
    }
    assert kinds(quantize(hybrid(), "int4")) == {"Linear": 0, "Int8Linear": 3, "Int4Linear": 8, "Int8Experts": 2}
    assert [int4_group_size(size) for size in (4096, 192, 96, 40)] == [128, 64, 32, None]


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_rounded_weights(mode):
    """The quantised model equals a full one whose weights are what the quantised ones stand for."""
    model = quantize(hybrid(), mode)
    widened = hybrid(tied=mode == "experts_int8").double()
    own = model.state_dict()
    with torch.no_grad():
        for name, parameter in widened.named_parameters():
            if name not in quantized_weights(model):
                parameter.copy_(own[name])
            elif (scale := quantized_weights(model)[name]) is None:
                parameter.copy_(own[name].dequantize())
            else:
                parameter.copy_(own[name].double() * own[scale].double().unsqueeze(-1))
    torch.testing.assert_close(logits(model).double(), logits(widened), atol=2e-5, rtol=1e-4)
    assert (logits(model) - logits(hybrid())).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_quantised_at_load_is_quantised_afterwards(mode, tied, tmp_path):
    hybrid(tied).save(tmp_path)
    loaded = statespan.load(tmp_path, quantize=mode)
    after = quantize(statespan.load(tmp_path), mode)
    assert kinds(loaded) == kinds(after)
    assert torch.equal(logits(loaded), logits(after))
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in after.state_dict().items()
    }
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_quantised_at_load_from_files_with_a_tensor_for_each_expert(tmp_path):
    model = statespan.build("jamba-tiny", seed=2).eval()
    model.save(tmp_path, format="transformers")
    loaded = statespan.load(tmp_path, quantize="experts_int8", dtype=torch.bfloat16)
    after = quantize(statespan.load(tmp_path, dtype=torch.bfloat16), "experts_int8")
    assert sum(type(module) is Int8Experts for module in loaded.modules()) == 4
    ours, theirs = loaded.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["backbone.layers.1.feed_forward.experts.up_proj"].dtype == torch.int8


def test_the_full_experts_are_never_all_in_memory(tmp_path, monkeypatch):
    """Of the experts one piece is there at a time, in full precision and widened."""
    model = statespan.build("jamba-tiny", seed=2)
    model.save(tmp_path, format="transformers")
    pieces: list[int] = []

    def measured(piece):
        pieces.append(piece.nbytes)
        return quantize_stack(piece)

    quantize_stack = checkpoint.quantize_stack
    monkeypatch.setattr(checkpoint, "quantize_stack", measured)
    statespan.load(tmp_path, quantize="experts_int8")
    experts = [value.nbytes for name, value in model.state_dict().items() if "experts" in name]
    assert sum(pieces) == sum(experts)
    assert max(pieces) <= max(experts) / 8  # 4 experts, gate and up apart


def test_generation_and_training_mode_of_a_quantised_model():
    for mode in MODES:
        model = quantize(hybrid(), mode)
        text = statespan.generate(model, [1, 2, 3], max_new_tokens=6, temperature=0, ignore_eos=True).token_ids
        ids = [1, 2, 3]
        for _ in range(6):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tuple(ids[3:]), mode


def test_bytes_of_weights():
    for mode in (None, "int8", "experts_int8"):
        model = hybrid() if mode is None else quantize(hybrid(), mode)
        assert weight_bytes(HYBRID, mode, torch.float32) == sum(value.nbytes for value in model.state_dict().values())
    int4 = weight_bytes(HYBRID, "int4", torch.float32)
    linear = [module for module in quantize(hybrid(), "int4").modules() if isinstance(module, Int4Linear)]
    full = sum(4 * module.weight.numel() for module in linear)
    rest = sum(
        v.nbytes
        for v in quantize(hybrid(), "int4").state_dict().values()
        if type(v) in (torch.Tensor, torch.nn.Parameter)
    )
    groups = sum(module.weight.numel() // int4_group_size(module.in_features) for module in linear)
    assert int4 == rest + sum(module.weight.numel() // 2 for module in linear) + 4 * groups
    assert int4 < weight_bytes(HYBRID, "int8", torch.float32) < full + rest
    assert 54 * 2**30 < weight_bytes(statespan.models.presets.preset("jamba-v0.1"), "experts_int8") < 54.2 * 2**30


def test_an_unknown_mode():
    with pytest.raises(UserError, match="did you mean 'experts_int8'"):
        quantize(hybrid(), "expert_int8")


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"int4 needs torchao: pip install 'statespan\[quantization\]'"):
        quantize(hybrid(), "int4")


@pytest.mark.parametrize("mode", MODES)
def test_a_quantised_model_is_not_saved(mode, tmp_path):
    assert is_quantized(quantize(hybrid(), mode))
    with pytest.raises(CheckpointError, match="quantised"):
        quantize(hybrid(), mode).save(tmp_path)
