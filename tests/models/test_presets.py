"""Every preset: exact parameter totals, its published figures, its layers, and the real model on the meta device."""

from collections import Counter

import pytest
import torch

from statespan.errors import UnknownName
from statespan.models.accounting import count_parameters
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.presets import PRESETS, preset, presets

# name: (total, active a token); of embeddings, experts, routers, norms and all
EXACT = {
    "mamba-130m": (129_135_360, 129_135_360),
    "mamba-370m": (371_516_416, 371_516_416),
    "mamba-790m": (793_204_224, 793_204_224),
    "mamba-1.4b": (1_372_178_432, 1_372_178_432),
    "mamba-2.8b": (2_768_345_600, 2_768_345_600),
    "mamba2-130m": (128_989_632, 128_989_632),
    "mamba2-370m": (368_346_624, 368_346_624),
    "mamba2-780m": (780_161_280, 780_161_280),
    "mamba2-1.3b": (1_343_757_312, 1_343_757_312),
    "mamba2-2.7b": (2_702_599_680, 2_702_599_680),
    "mamba2attn-2.7b": (2_697_590_880, 2_697_590_880),
    "mambabyte-353m": (353_628_160, 353_628_160),
    "mambabyte-972m": (973_387_520, 973_387_520),
    "mambabyte-1.6b": (1_605_392_640, 1_605_392_640),
    "jamba-v0.1": (51_570_323_328, 12_110_311_296),
    "jamba-1.5-mini": (51_570_323_328, 12_110_311_296),
    "jamba-1.5-large": (398_555_145_696, 94_149_338_592),
    "jamba-tiny-dev": (318_688_640, 167_693_696),
    "jamba-102m": (101_935_040, 64_186_304),
    "jamba-tiny": (19_528_560, 18_742_128),
    "mamba-25m": (52_855_808, 52_855_808),
    "moe-mamba-25m": (567_952_384, 52_052_992),
    "transformer-25m": (50_906_112, 50_906_112),
    "transformer-moe-25m": (571_130_880, 51_037_184),
    "mamba-100m": (159_290_880, 159_290_880),
    "moe-mamba-100m": (2_477_643_264, 156_096_000),
    "transformer-100m": (151_868_928, 151_868_928),
    "transformer-moe-100m": (2_492_683_776, 152_262_144),
    "blackmamba-340m-1.5b": (1_458_462_072, 343_694_712),
    "blackmamba-630m-2.8b": (2_783_213_584, 628_770_832),
    "mamba2-hybrid-8b": (8_654_517_248, 8_654_517_248),
    "transformer-130m": (123_568_896, 123_568_896),
    "transformer-370m": (359_818_240, 359_818_240),
    "transformer-790m": (756_782_592, 756_782_592),
    "transformer-1.4b": (1_317_324_800, 1_317_324_800),
    "transformer-2.8b": (2_666_437_120, 2_666_437_120),
    "llama-2-7b": (6_738_415_616, 6_738_415_616),
    "mistral-7b": (7_241_732_096, 7_241_732_096),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "lstm-130m": (127_068_160, 127_068_160),
    "gru-130m": (127_071_232, 127_071_232),
    "s4-130m": (133_264_128, 133_264_128),
    "s4d-130m": (128_545_536, 128_545_536),
}

# name: (total, active) in millions as the papers and model cards print them, and whether they leave embeddings out
PUBLISHED = {
    "mamba-130m": (129.1, 129.1, False),
    "mamba-370m": (371.5, 371.5, False),
    "mamba-790m": (793.2, 793.2, False),
    "mamba-1.4b": (1372.2, 1372.2, False),
    "mamba-2.8b": (2768.3, 2768.3, False),
    "mamba2-130m": (129.0, 129.0, False),
    "mamba2-370m": (368.3, 368.3, False),
    "mamba2-780m": (780.2, 780.2, False),
    "mamba2-1.3b": (1343.8, 1343.8, False),
    "mamba2-2.7b": (2702.6, 2702.6, False),
    "mambabyte-353m": (353.6, 353.6, False),
    "mambabyte-972m": (973.4, 973.4, False),
    "mambabyte-1.6b": (1605.4, 1605.4, False),
    "jamba-v0.1": (51_570, 12_110, False),
    "jamba-1.5-large": (398_560, 94_150, False),
    "jamba-tiny-dev": (319, 168, False),
    "mixtral-8x7b": (46_703, 12_880, False),
    "mamba-25m": (27, 27, True),
    "moe-mamba-25m": (542, 26, True),
    "transformer-25m": (25, 25, True),
    "transformer-moe-25m": (545, 25, True),
    "mamba-100m": (121, 121, True),
    "moe-mamba-100m": (2439, 117, True),
    "transformer-100m": (113, 113, True),
    "transformer-moe-100m": (2454, 114, True),
    "blackmamba-340m-1.5b": (1458, 344, False),
    "blackmamba-630m-2.8b": (2783, 629, False),
    "mamba2-hybrid-8b": (8650, 8650, False),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_totals(name: str) -> None:
    count = count_parameters(preset(name))
    assert (count.total, count.active) == EXACT[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    """As printed: a decimal for one of tenths of a million, whole millions, or tens of millions for billions."""
    total, active, without_embedding = PUBLISHED[name]
    count = count_parameters(preset(name))
    left_out = count.embedding if without_embedding else 0
    for ours, printed in ((count.total - left_out, total), (count.active - left_out, active)):
        rounding = 0.05 if isinstance(printed, float) else 5 if printed > 5000 else 0.5
        assert abs(ours / 1e6 - printed) <= rounding


def test_every_preset_but_the_tunable_demo_is_pinned() -> None:
    assert set(EXACT) == set(presets()) - {"jamba-demo"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_real_model_has_the_counted_parameters(name: str) -> None:
    model = build(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count_parameters(preset(name)).total


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name: str) -> None:
    assert ModelConfig.from_dict(preset(name).to_dict()) == preset(name)


def test_hybrid_8b_pattern() -> None:
    """24 Mamba-2, 4 attention, 28 MLP; attention is neither first nor last (arXiv 2406.07887)."""
    layers = [str(spec) for spec in preset("mamba2-hybrid-8b").layers]
    assert Counter(layers) == {"mamba2": 24, "attention": 4, "mlp": 28}
    assert [i for i, layer in enumerate(layers) if layer == "attention"] == [10, 22, 33, 45]


def test_jamba_layout() -> None:
    layers = preset("jamba-v0.1").layers
    assert [i for i, spec in enumerate(layers) if spec.mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, spec in enumerate(layers) if spec.feed_forward == "moe"] == list(range(1, 32, 2))
    large = Counter(str(spec) for spec in preset("jamba-1.5-large").layers)
    assert large == {"mamba1+mlp": 27, "mamba1+moe": 36, "attention+mlp": 9}
    assert preset("jamba-1.5-mini").layers == layers


def test_mamba2attn_layout() -> None:
    layers = preset("mamba2attn-2.7b").layers
    assert [i for i, spec in enumerate(layers) if spec.mixer == "attention"] == [9, 18, 27, 36, 45, 56]
    assert {str(spec) for spec in layers} == {"attention", "mamba2"}


def test_padded_vocabularies() -> None:
    assert preset("mamba-130m").padded_vocab_size == 50280
    assert preset("mamba2-130m").padded_vocab_size == 50288
    assert preset("mambabyte-353m").padded_vocab_size == 256


def test_routers() -> None:
    jamba, mixtral, switch = preset("jamba-v0.1").moe, preset("mixtral-8x7b").moe, preset("moe-mamba-25m").moe
    assert (jamba.num_experts, jamba.top_k, jamba.renormalize, jamba.capacity_factor) == (16, 2, False, None)
    assert (mixtral.num_experts, mixtral.top_k, mixtral.renormalize) == (8, 2, True)
    assert (switch.num_experts, switch.top_k, switch.capacity_factor, switch.load_balance_coef) == (42, 1, 1.0, 0.01)
    black = preset("blackmamba-340m-1.5b").moe
    assert (black.score_function, black.balancing, black.top_k) == ("sigmoid", "sinkhorn", 1)


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"preset.*'mamba-13m'; did you mean 'mamba-130m'\?"):
        preset("mamba-13m")


def test_jamba_tiny_runs() -> None:
    model = build("jamba-tiny", seed=0)
    with torch.no_grad():
        logits = model(torch.arange(7)[None]).logits
    assert logits.shape == (1, 7, 65536)
    assert torch.isfinite(logits).all() and logits.std() > 0
