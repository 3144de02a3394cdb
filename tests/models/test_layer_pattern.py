"""The three notations of the layer list."""

import pytest

from statespan.errors import UserError
from statespan.models.layer_pattern import LayerSpec, pattern_from_periods, pattern_from_text


def test_text_of_the_8b_hybrid() -> None:
    text = "M+M+M++M+M*+M+M+M+M++M*+M+M+M+M+M*++M+M+M+M+M*+M++M+M+M+"
    layers = [str(layer) for layer in pattern_from_text(text)]
    assert (layers.count("mamba2"), layers.count("attention"), layers.count("mlp")) == (24, 4, 28)
    assert pattern_from_text("M-") == pattern_from_text("M +") == (LayerSpec("mamba2"), LayerSpec(None, "mlp"))
    assert [str(layer) for layer in pattern_from_text("SD+m")] == ["s4", "s4d", "mlp", "mamba1"]


def test_periods_of_jamba() -> None:
    layers = pattern_from_periods(32, attention_period=8, attention_offset=4, expert_period=2, expert_offset=1)
    assert [i for i, layer in enumerate(layers) if layer.mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, layer in enumerate(layers) if layer.feed_forward == "moe"] == list(range(1, 32, 2))
    assert {layer.mixer for layer in layers} == {"attention", "mamba1"}


@pytest.mark.parametrize("text", ["mamba1", "mlp", "attention+moe", "mamba2+mlp", "s4", "s4d+mlp", "lssl+moe"])
def test_names_round_trip(text: str) -> None:
    assert str(LayerSpec.from_text(text)) == text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerSpec.from_text("mamba3"), "did you mean 'mamba"),
        (lambda: LayerSpec.from_text("mlp+mamba1"), "write mixer, feed-forward"),
        (lambda: LayerSpec.from_text("mamba1+mamba2"), "write mixer, feed-forward"),
        (lambda: LayerSpec(), "needs a mixer"),
        (lambda: pattern_from_text("MxM"), "'x' at 1"),
        (lambda: pattern_from_text("  "), "empty"),
        (lambda: pattern_from_periods(8, attention_period=4, attention_offset=4), "below the period 4"),
    ],
)
def test_mistakes_are_one_line(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
