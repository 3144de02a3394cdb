"""Parameters, FLOPs and bytes of a config against the real modules, PyTorch's FLOP counter and published figures."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from statespan.layers.config import (
    AttentionConfig,
    LSSLConfig,
    Mamba1Config,
    Mamba2Config,
    MLPConfig,
    MoEConfig,
    RecurrentConfig,
    S4Config,
    S4DConfig,
    S6Config,
)
from statespan.models.accounting import (
    count_layer_parameters,
    count_parameters,
    forward_flops,
    kv_bytes,
    kv_bytes_per_token,
    layer_forward_flops,
    layer_state_bytes,
    state_bytes,
    training_flops,
)
from statespan.models.backbone import Block, build_feed_forward, build_mixer
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec
from statespan.models.parameter_shapes import feed_forward_shapes, mixer_shapes
from statespan.models.presets import preset

GIB = 2**30
CONTEXT = 256 * 1024
MIXERS = ["mamba1", "mamba2", "attention", "s4", "s4d", "lssl", "s6", "lstm", "gru"]

# odd sizes, every option once on and once off
PLAIN = ModelConfig(
    vocab_size=11,
    hidden_size=24,
    mamba1=Mamba1Config(state_size=5, conv_kernel=3, dt_rank=7),
    mamba2=Mamba2Config(state_size=6, head_dim=8, num_groups=3),
    attention=AttentionConfig(num_heads=6, num_kv_heads=2),
    s4=S4Config(state_size=10),
    s4d=S4DConfig(state_size=6, block="mamba", expand=2),
    lssl=LSSLConfig(state_size=5, block="s5"),
    s6=S6Config(state_size=5, dt_rank=3),
    mlp=MLPConfig(17),
    moe=MoEConfig(num_experts=5, top_k=2, intermediate_size=9),
)
OPTIONS = ModelConfig(
    vocab_size=11,
    vocab_multiple=8,
    hidden_size=24,
    tie_embeddings=False,
    final_norm="layer",
    mamba1=Mamba1Config(expand=3, conv_bias=False, proj_bias=True, inner_norms=True),
    mamba2=Mamba2Config(num_heads=10, head_dim=4, conv_bias=False, proj_bias=True, gated_norm=False),
    attention=AttentionConfig(
        num_heads=3, head_dim=10, qkv_bias=True, out_bias=True, conv_kernel=4, learned_positions=9
    ),
    s4=S4Config(state_size=4, block="h3", conv_kernel=3, proj_bias=True),
    s4d=S4DConfig(state_size=7, init="real", block="gelu", proj_bias=True),
    lssl=LSSLConfig(state_size=6, block="mamba"),
    s6=S6Config(state_size=4, block="h3", expand=2, proj_bias=True),
    recurrent=RecurrentConfig(bias=False),
    mlp=MLPConfig(17, activation="gelu", bias=True),
    moe=MoEConfig(num_experts=3, top_k=1, intermediate_size=9, activation="relu", bias=True, router_bias=True),
)


@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixer_shapes_are_the_modules(config: ModelConfig, name: str) -> None:
    real = {key: tuple(value.shape) for key, value in build_mixer(config, name).named_parameters()}
    assert mixer_shapes(config, name) == real


@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("name", ["mlp", "moe"])
def test_feed_forward_shapes_are_the_modules(config: ModelConfig, name: str) -> None:
    real = {key: tuple(value.shape) for key, value in build_feed_forward(config, name).named_parameters()}
    assert feed_forward_shapes(config, name) == real


@pytest.mark.parametrize("spec", ["mamba1", "mamba2+mlp", "attention+moe", "moe", "gru+mlp"])
def test_a_layer_counts_its_norms(spec: str) -> None:
    layer = LayerSpec.from_text(spec)
    real = sum(p.numel() for p in Block(PLAIN, layer).parameters())
    assert count_layer_parameters(PLAIN, layer).total == real


@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["plain", "options"])
def test_the_whole_model(config: ModelConfig) -> None:
    config = config.replace(layers=tuple(LayerSpec.from_text(name) for name in ("mamba1+moe", "attention+mlp", "gru")))
    model = build(config, device="meta")
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert count.active == count.total - experts + experts * config.moe.top_k // config.moe.num_experts
    assert count.embedding == config.padded_vocab_size * 24 * (1 if config.tie_embeddings else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["plain", "options"])
@pytest.mark.parametrize("name", MIXERS)
def test_state_bytes_are_the_states(config: ModelConfig, name: str, dtype: torch.dtype) -> None:
    state = build_mixer(config, name).new_state(1, torch.device("cpu"), dtype)
    real = sum(tensor.nbytes for key, tensor in state.tensors().items() if key not in ("key", "value", "next_position"))
    assert layer_state_bytes(config, LayerSpec.from_text(name), dtype.itemsize) == real


def test_kv_cache_of_published_models_at_256k() -> None:
    """GiB in 16 bits: Jamba's paper prints 4 against Mixtral's and Mistral's 32, Llama-2's 128; Jamba-1.5-Large 9."""
    expected = {"jamba-v0.1": 4, "jamba-1.5-mini": 4, "jamba-1.5-large": 9, "mixtral-8x7b": 32, "llama-2-7b": 128}
    assert {name: kv_bytes(preset(name), CONTEXT) / GIB for name in expected} == expected
    assert kv_bytes_per_token(preset("jamba-v0.1")) == 16_384
    assert kv_bytes_per_token(preset("mixtral-8x7b")) == 131_072
    assert kv_bytes(preset("mamba-130m"), CONTEXT) == 0


def test_a_sliding_window_bounds_the_cache() -> None:
    mistral = preset("mistral-7b")
    assert kv_bytes(mistral, CONTEXT) == kv_bytes(mistral, 4096) == GIB // 2
    assert kv_bytes(mistral, 100) == 100 * 131_072
    unbounded = mistral.replace(attention=AttentionConfig(32, num_kv_heads=8, rope_theta=1e4))
    assert kv_bytes(unbounded, CONTEXT) == 32 * GIB


def test_published_state_sizes() -> None:
    """SSM states a sequence in float32, without conv windows: MB of the papers' sizes."""
    for name, expected in {"mamba-130m": 2.36, "mamba-2.8b": 21.0, "mamba2-130m": 18.9, "mamba2-2.7b": 167.8}.items():
        config = preset(name)
        conv = state_bytes(config, 4) - state_bytes(config, 2)  # half of the windows' float32 bytes
        assert (state_bytes(config, 4) - 2 * conv) / 1e6 == pytest.approx(expected, rel=3e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_flops_of_a_transformer_are_pytorchs(activation: str, tied: bool) -> None:
    """PyTorch counts the whole square of attention, as if each token saw the last one's context."""
    config = ModelConfig(
        vocab_size=40,
        hidden_size=32,
        tie_embeddings=tied,
        layers=(LayerSpec("attention", "mlp"),) * 2,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        mlp=MLPConfig(48, activation=activation),  # type: ignore[arg-type]
    )
    model = build(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 16, dtype=torch.int64))
    assert counter.get_total_flops() == 16 * forward_flops(config, 16)


def test_flops_by_hand() -> None:
    """One layer of each kind, written out as products of sizes; h 24, d 48, n 5, r 7, taps 3, ..."""
    flops = {name: layer_forward_flops(PLAIN, LayerSpec.from_text(name), 100) for name in [*MIXERS, "mlp", "moe"]}
    assert flops == {
        "mamba1": 2 * (24 * 96 + 48 * 3 + 48 * 17 + 7 * 48 + 48 * 24) + 7 * 48 * 5,
        "mamba2": 2 * (24 * (48 + 48 + 36 + 6) + 84 * 4 + 48 * 24) + 5 * 48 * 6,
        "attention": 2 * (24 * 40 + 24 * 24) + 4 * 24 * 100,
        "s4": 2 * 24 * 48 + 20 * 24 * 10,
        "s4d": 2 * (24 * 96 + 48 * 4 + 48 * 24) + 7 * 48 * 6,
        "lssl": 2 * 24 * 24 + 2 * 24 * 5 * 7,
        "s6": 2 * (24 * 48 + 24 * 13 + 3 * 24) + 7 * 24 * 5,
        "lstm": 2 * (2 * 4 * 24 * 24),
        "gru": 2 * (2 * 3 * 24 * 24),
        "mlp": 2 * 3 * 24 * 17,
        "moe": 2 * (24 * 5 + 2 * 3 * 24 * 9),
    }
    bare = OPTIONS.replace(attention=replace(OPTIONS.attention, learned_positions=None))
    assert len({layer_forward_flops(c, LayerSpec("attention"), 100) for c in (OPTIONS, bare)}) == 1  # looked up
    assert layer_forward_flops(OPTIONS, LayerSpec(None, "moe"), 100) == 2 * (24 * 3 + 2 * 24 * 9)  # biases are free


def test_matrices_of_mamba_130m_cost_what_is_known() -> None:
    """0.258 GFLOP a token of matrix work; conv and scan add about 1%."""
    assert forward_flops(preset("mamba-130m"), 1) == pytest.approx(0.258e9, rel=0.015)
    assert forward_flops(preset("mamba-130m"), 1) == forward_flops(preset("mamba-130m"), CONTEXT)


@pytest.mark.parametrize("window", [None, 10, 64])
def test_training_flops_are_three_times_the_mean(window: int | None) -> None:
    attention = AttentionConfig(num_heads=4, sliding_window=window)
    config = PLAIN.replace(layers=(LayerSpec("attention", "mlp"), LayerSpec("mamba1")), attention=attention)
    mean = sum(forward_flops(config, t) for t in range(1, 64)) / 63
    assert training_flops(config, 63) == pytest.approx(3 * mean, abs=3)
