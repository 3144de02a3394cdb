"""Our own models written for transformers: equal logits where it can express them, one line where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statespan.checkpoints import convert, detect, load, save
from statespan.errors import CheckpointError, UnknownName
from statespan.layers.config import AttentionConfig, Mamba1Config, Mamba2Config, MLPConfig, MoEConfig, RopeScaling
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec, pattern_from_periods
from statespan.models.quantize import quantize

ROPE = AttentionConfig(num_heads=4, rope_theta=1e4)
NO_ROPE = AttentionConfig(num_heads=4, num_kv_heads=2)
BASE = ModelConfig(vocab_size=97, hidden_size=32, mlp=MLPConfig(20), moe=MoEConfig(num_experts=3, intermediate_size=20))
JAMBA = BASE.replace(
    layers=pattern_from_periods(5, attention_period=4, attention_offset=2, expert_period=2, expert_offset=1),
    mamba1=Mamba1Config(inner_norms=True, state_size=8, dt_rank=3),
    attention=NO_ROPE,
    tie_embeddings=False,
)
MAMBA2 = BASE.replace(layers=(LayerSpec("mamba2"),) * 2, mamba2=Mamba2Config(head_dim=8, state_size=8, num_groups=2))
LLAMA = BASE.replace(layers=(LayerSpec("attention", "mlp"),) * 2, attention=ROPE)
MIXTRAL = BASE.replace(
    layers=(LayerSpec("attention", "moe"),) * 2,
    attention=ROPE,
    moe=MoEConfig(num_experts=3, intermediate_size=20, renormalize=True, load_balance_coef=0.01),
)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (BASE.replace(vocab_multiple=8), "mamba"),
        (MAMBA2, "mamba2"),
        (JAMBA, "jamba"),
        (JAMBA.replace(layers=pattern_from_periods(3, feed_forward="mlp")), "jamba"),
        (JAMBA.replace(layers=(LayerSpec("attention", "moe"),) * 2), "jamba"),
        (JAMBA.replace(layers=(LayerSpec("mamba1", "moe"), LayerSpec("mamba1", "mlp"))), "jamba"),
        (LLAMA, "llama"),
        (LLAMA.replace(attention=AttentionConfig(4, rope_theta=1e4, rope_scaling=RopeScaling(4, 1, 4, 16))), "llama"),
        (LLAMA.replace(attention=AttentionConfig(4, 2, rope_theta=1e4, sliding_window=5)), "mistral"),
        (MIXTRAL, "mixtral"),
    ],
)
def test_our_models_in_transformers(
    config: ModelConfig, model_type: str, build_random: Any, transformers: Any, tmp_path: Path, token_ids: Tensor
) -> None:
    model = build_random(config)
    save(model, tmp_path, "transformers")
    assert detect(tmp_path) == model_type
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        expected = theirs.eval()(token_ids, use_cache=False).logits[..., : config.vocab_size]
        torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    back = load(tmp_path)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BASE.replace(layers=(LayerSpec("mamba2", "moe"),)), "has mamba2+moe layers, and transformers has no such"),
        (
            BASE.replace(layers=(LayerSpec("mamba2"), LayerSpec(None, "moe"))),
            "mixes the layers mamba2, moe, and transformers has no such model",
        ),
        (BASE.replace(layers=(LayerSpec("lstm"),)), "has lstm layers"),
        (BASE.replace(final_norm="layer"), "a final LayerNorm, which mamba"),
        (BASE.replace(mamba1=Mamba1Config(inner_norms=True)), "norms on dt, B and C, which mamba"),
        (BASE.replace(mamba1=Mamba1Config(discretization="zoh")), "zoh discretization, which mamba"),
        (MAMBA2.replace(mamba2=Mamba2Config(head_dim=8, gated_norm=False)), "no RMSNorm after the gate, which mamba2"),
        (MAMBA2.replace(mamba2=Mamba2Config(head_dim=8, norm_groups=2)), "groups of its own, which mamba2"),
        (MAMBA2.replace(mamba2=Mamba2Config(head_dim=8, num_heads=4)), "other than expand * hidden_size"),
        (JAMBA.replace(mamba1=Mamba1Config()), "no norms on dt, B and C, which jamba"),
        (JAMBA.replace(attention=ROPE), "rotary positions, which jamba"),
        (JAMBA.replace(mlp=MLPConfig(24)), "experts and MLPs of different sizes, which jamba"),
        (JAMBA.replace(mlp=MLPConfig(20, "gelu")), "gelu MLPs, which jamba"),
        (JAMBA.replace(moe=MoEConfig(3, 2, 20, renormalize=True)), "router weights that are not plain, which jamba"),
        (
            JAMBA.replace(layers=JAMBA.layers[:3] + JAMBA.layers[2:3]),
            "attention at layers without a period, which jamba",
        ),
        (LLAMA.replace(attention=AttentionConfig(4, rope_theta=1e4, qkv_bias=True)), "biases on some of its attention"),
        (LLAMA.replace(attention=AttentionConfig(4, rope_theta=1e4, rotary_dim=4)), "partial rotary positions"),
        (LLAMA.replace(attention=AttentionConfig(4, rope_theta=1e4, learned_positions=64)), "learnt positions"),
        (LLAMA.replace(attention=AttentionConfig(4, rope_theta=1e4, conv_kernel=4)), "a conv in its attention"),
        (MIXTRAL.replace(moe=MoEConfig(3, 2, 20, score_function="sigmoid", renormalize=True)), "a sigmoid router"),
        (MIXTRAL.replace(moe=MoEConfig(3, 2, 20, router_bias=True, renormalize=True)), "biases in its experts"),
    ],
)
def test_what_transformers_cannot_express(config: ModelConfig, reason: str, build_random: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(build_random(config), tmp_path / "out", "transformers")
    message = str(caught.value)
    assert reason in message and message.endswith("save it with format='statespan'") and "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2", "attention", "s4", "s4d", "lssl", "lstm", "gru"])
@pytest.mark.parametrize("feed_forward", [None, "mlp", "moe"])
def test_our_format_holds_every_layer(mixer: Any, feed_forward: Any, build_random: Any, tmp_path: Path) -> None:
    config = BASE.replace(
        layers=(LayerSpec(mixer, feed_forward), LayerSpec(None, "mlp")),
        mamba2=Mamba2Config(head_dim=8, dt_limit=(0.0, 0.5)),
        attention=AttentionConfig(4, conv_kernel=3, qkv_bias=True, rope_theta=10.0, rope_scaling=RopeScaling()),
        moe=MoEConfig(3, 1, 20, "relu", bias=True, router_bias=True, score_function="sigmoid", balancing="sinkhorn"),
        final_norm="layer",
    )
    model = build_random(config)
    save(model, tmp_path)
    back = load(tmp_path)
    assert back.config == config
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(dtype: torch.dtype, build_random: Any, tmp_path: Path) -> None:
    model = build_random(JAMBA).to(dtype)
    for target in ("statespan", "transformers"):
        save(model, tmp_path / target, target)
        back = load(tmp_path / target)
        expected = torch.float32 if dtype == torch.float16 else dtype  # float16 has no fast forms on the CPU
        for name, tensor in back.state_dict().items():
            original = model.state_dict()[name]
            assert torch.equal(tensor, original.to(tensor.dtype)), name
            assert tensor.dtype == (original.dtype if original.dtype != torch.float16 else expected), name
        assert back.dtype == expected


def test_a_loaded_model_trains(build_random: Any, tmp_path: Path) -> None:
    save(build_random(JAMBA), tmp_path)
    model = load(tmp_path)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(9).unsqueeze(0)
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" not in name)


def test_convert_there_and_back(build_random: Any, tmp_path: Path) -> None:
    model = build_random(JAMBA)
    model.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "transformers")
    convert(tmp_path / "b", tmp_path / "b")  # onto itself
    assert detect(tmp_path / "b") == "statespan"
    back = load(tmp_path / "b")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_an_unknown_format_offers_the_nearest(build_random: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown checkpoint format: 'transformer'; did you mean 'transformers'\?"):
        save(build_random(BASE), tmp_path, "transformer")  # type: ignore[arg-type]  # the mistake under test


def test_a_shard_of_no_bytes(build_random: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_shard_bytes must be at least 1, got 0"):
        save(build_random(BASE), tmp_path, max_shard_bytes=0)


@pytest.mark.parametrize("format", ["statespan", "transformers"])
def test_a_quantised_model_is_refused_and_what_was_saved_stays(tmp_path: Path, format: Any) -> None:
    model = build(BASE.replace(layers=(LayerSpec("mamba1"),)))
    save(model, tmp_path, format)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"quantised for inference.*save the model before"):
        save(quantize(model), tmp_path, format)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
