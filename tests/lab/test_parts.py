"""What the experiments measure with: views, signals, partly selective layers, noise, groups of rows."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from statespan.lab import hippo, jamba, noise, selection, three_views
from statespan.lab import rows as table
from statespan.lab.costs import state_bytes
from statespan.lab.experiment import Line, Plot
from statespan.lab.picture import draw
from statespan.lab.text_training import TextSetting, train_on_text
from statespan.layers.config import AttentionConfig, Mamba1Config
from statespan.layers.mamba1 import Mamba1
from statespan.models.build import build
from statespan.models.config import ModelConfig
from statespan.models.layer_pattern import LayerSpec

# --- three views


@pytest.mark.parametrize("view", three_views.VARIANTS)
def test_each_view_is_the_recurrence_by_hand(view: str) -> None:
    """x' = A x + u held over a step: x_k = e^(dt A) x + (e^(dt A) - 1) / A u, y = C x + D u, in a plain loop."""
    setting = three_views.EXPERIMENT.settings["tiny"]
    layer = three_views._layer(setting, seed=2).double()
    u = torch.randn(2, 21, setting.channels, dtype=torch.float64)
    A, dt, state = -layer.log_A_real.exp(), layer.log_dt.exp(), torch.zeros(2, setting.channels, setting.state_size)
    truth: list[Tensor] = []
    for token in u.unbind(1):
        decay = torch.exp(dt[:, None] * A)
        state = decay * state + (decay - 1) / A * token[..., None]
        truth.append((layer.C * state).sum(-1) + layer.D * token)
    with torch.no_grad():
        torch.testing.assert_close(three_views.view_of(view, layer)(u), torch.stack(truth, 1), rtol=1e-10, atol=1e-11)


def test_a_view_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = three_views.EXPERIMENT.settings["tiny"]
    right = three_views._scan
    monkeypatch.setattr(three_views, "_scan", lambda layer, u: right(layer, u) * (1 + 1e-9))
    (first, *_) = three_views.run(setting, "scan", 0, lambda share, text: None)
    assert first["difference"] == pytest.approx(1e-9, rel=1e-3)


# --- HiPPO


def test_a_stretched_signal_is_the_same_slower() -> None:
    slow, fast = hippo.signal(2000, 5, seed=3), hippo.signal(1000, 5, seed=3)
    torch.testing.assert_close(slow[1::2], fast)
    assert 0.1 < fast.var() < 4


def test_legs_remembers_a_polynomial_exactly() -> None:
    """A parabola lies in the span of three polynomials: the error is that of the steps alone."""
    setting = hippo.EXPERIMENT.settings["tiny"]
    errors = []
    for length in (250, 500, 1000):
        time = torch.arange(1, length + 1, dtype=torch.float64) / length
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hippo, "signal", lambda *arguments, time=time: time**2)
            past, told = hippo.recall(setting, "legs", length, 3, 0)
        errors.append(hippo._relative(told, past))
    assert errors[0] < 0.02 and errors[2] < errors[1] < errors[0]


# --- selection


def fresh(variant: str) -> Mamba1:
    config = ModelConfig(hidden_size=16, layers=(LayerSpec("mamba1"),), mamba1=Mamba1Config(state_size=4))
    model = build(config, seed=1)
    selection.adapt(model, variant, seed=5)
    mixer = model.layers[0].mixer
    assert isinstance(mixer, Mamba1)
    return mixer


@pytest.mark.parametrize(("variant", "selected"), [("dt", "dt"), ("B", "B"), ("C", "C"), ("none", ""), ("all", "dtBC")])
def test_what_is_not_selected_does_not_see_the_input(variant: str, selected: str) -> None:
    mixer, whole = fresh(variant), fresh("all")
    x = torch.randn(2, 7, mixer.inner_size)
    found = dict(zip(("dt", "B", "C"), mixer.selection(x), strict=True))
    truth = dict(zip(("dt", "B", "C"), whole.selection(x), strict=True))
    for name, value in found.items():
        if name in (selected, *selected[2:]) or variant == "all":
            torch.testing.assert_close(value, truth[name])
        else:
            assert torch.equal(value, value[:1, :1].expand_as(value))
            assert name == "dt" or value.abs().max() > 0.1


@pytest.mark.parametrize("name", ["dt", "B", "C"])
def test_constants_are_trained_and_what_is_masked_is_not(name: str) -> None:
    mixer = fresh(name)
    stand_in = mixer.x_proj
    assert isinstance(stand_in, selection.PartlySelective)
    y, _ = mixer(torch.randn(2, 9, 16))
    y.square().sum().backward()
    selected = stand_in.mask.bool()
    constant, weight = stand_in.constant_bias.grad, stand_in.projection.weight.grad
    assert constant is not None and weight is not None
    assert (constant[~selected] != 0).all() and (constant[selected] == 0).all()
    assert (weight[selected].abs().sum(1) > 0).all() and (weight[~selected] == 0).all()


def test_initial_values_of_A() -> None:
    torch.testing.assert_close(-fresh("a_half").A_log.exp(), torch.full((32, 4), -0.5))
    assert fresh("a_random").A_log.std() > 0.7
    torch.testing.assert_close(fresh("all").A_log.exp()[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert [selection.state_size(variant) for variant in ("n1", "n8", "all", "dt_n1")] == [1, 8, 16, 1]


# --- Jamba


def test_ratios_and_positions() -> None:
    setting = jamba.EXPERIMENT.settings["h100"]

    def places(variant: str) -> list[int]:
        layers = jamba.model_config(setting, variant).layers
        return [index for index, spec in enumerate(layers) if spec.mixer == "attention"]

    assert places("mamba") == [] and places("attention") == list(range(8))
    assert places("one_in_8") == [4] and places("one_in_4") == [2, 6] and places("one_in_2") == [1, 3, 5, 7]
    assert jamba.model_config(setting, "one_in_8").attention.rope_theta is None
    assert jamba.model_config(setting, "one_in_8_rope").attention.rope_theta is not None
    assert jamba.model_config(setting, "inner_norms").mamba1.inner_norms


def test_norms_bound_what_outliers_do() -> None:
    rows = [{"variant": "outliers", "seed": 0} | row for row in jamba.outliers(jamba.EXPERIMENT.settings["tiny"], 0)]
    with_norms, without = jamba._growth(rows, norms=True), jamba._growth(rows, norms=False)
    assert with_norms is not None and without is not None
    assert with_norms < 4 and without > 50


# --- noise

TEXT = "The quick brown fox jumps over the lazy dog; " * 200


def test_each_noise_does_what_it_says() -> None:
    assert noise.disturb("aé b", "antspeak", 0.3, 0) == "A É   B "
    case = noise.disturb(TEXT, "case", 0.3, 0)
    assert case.lower() == TEXT.lower() and 0.45 < sum(c.isupper() for c in case) / sum(map(str.isalpha, TEXT)) < 0.55
    dropped = noise.disturb(TEXT, "drop", 0.3, 0)
    assert 0.67 < len(dropped) / len(TEXT) < 0.73
    assert all(character in rest for rest in [iter(TEXT)] for character in dropped)  # in the same order
    swapped = noise.disturb(TEXT, "swap", 0.3, 0)
    assert Counter(swapped) == Counter(TEXT)
    moved = sum(a != b for a, b in zip(TEXT, swapped, strict=True)) / len(TEXT)
    assert 0.22 < moved < 0.32
    for name in noise.NOISES:
        assert noise.disturb(TEXT, name, 0.3, 1) == noise.disturb(TEXT, name, 0.3, 1)
    assert noise.disturb(TEXT, "swap", 0.3, 1) != swapped


# --- training on text


def test_the_trainer_learns_the_text(text: Path) -> None:
    setting = TextSetting(
        time="",
        variants=("x",),
        text=str(text),
        sequence_length=64,
        batch_size=4,
        steps=60,
        learning_rate=1e-2,
        precision="float32",
        log_every=20,
    )
    config = ModelConfig(hidden_size=32, layers=(LayerSpec("mamba1"),))
    _, rows = train_on_text(setting, config, 0, lambda share, words: None)
    assert [row.get("step") for row in rows] == [20, 40, 60, None]
    assert rows[-1]["held_out"] < 2.5 < rows[0]["bits_per_byte"]
    changed: list[int] = []
    train_on_text(setting, config, 0, lambda share, words: None, adapt=lambda model: changed.append(len(model.layers)))
    assert changed == [1]


# --- groups of rows

ROWS = [
    {"variant": "a", "seed": 0, "x": 1, "y": 2.0},
    {"variant": "a", "seed": 1, "x": 1, "y": 4.0},
    {"variant": "a", "seed": 0, "x": 2, "y": 8.0},
    {"variant": "b", "seed": 0, "x": 1, "y": None},
]


def test_rows_are_averaged_over_seeds() -> None:
    assert table.mean_of(ROWS, "y", variant="a", x=1) == 3.0
    assert table.mean_of(ROWS, "y", variant="b") is None
    assert table.spread(ROWS, "y", variant="a", x=1) == "3.0 (2.0 to 4.0)"
    assert table.spread(ROWS, "y", variant="a", x=2) == "8.0"
    line = table.line("a", ROWS, "x", "y", variant="a")
    assert (line.x, line.y, line.seeds) == ([1, 2], [3.0, 8.0], [[2.0, 8.0], [4.0, None]])
    assert table.line("a", ROWS[::2], "x", "y", variant="a").seeds == ()


def test_figures_are_told_by_name() -> None:
    assert table.told({"a": 1.26, "b": None, "c": "1.5 (1.4 to 1.6)"}) == "a 1.3, c 1.5 (1.4 to 1.6)"
    assert table.told({"a": 2.0}, 0) == "a 2" and table.told({"a": None}) == ""


def test_slopes_and_answers() -> None:
    assert table.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    assert table.slope([1], [3]) is None
    assert table.ordered(2, 1) is True and table.ordered(2, 1, 1) is False and table.ordered(None, 1) is None
    assert table.all_of(True, None) is None and table.all_of(False, None) is False and table.all_of(True) is True


def test_state_bytes_count_the_slots_in_use() -> None:
    """A cache has room to grow; what counts is 2 heads of 8 in float32, keys and values, and an int32 position."""
    config = ModelConfig(hidden_size=16, layers=(LayerSpec("attention"),), attention=AttentionConfig(num_heads=2))
    model = build(config)
    with torch.no_grad():
        state = model(torch.zeros(1, 10, dtype=torch.int64), state=model.new_state(1)).state
    assert state is not None
    assert state_bytes(state, 10) == pytest.approx(10 * (2 * 16 * 4 + 4) + 4)
    assert math.isfinite(state.num_bytes)


def test_named_places_and_colours_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label has one colour in all panels, and named points are not joined."""
    shown: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: shown.append(self))
    a, b = Line("a", [0, 1], [1.0, 2.0], [[0.5, 2.0], [1.5, None]]), Line("b", [0, 1], [3.0, 4.0])
    draw(tmp_path / "x.png", [Plot("", "", "", [a, b]), Plot("", "", "", [b], names=("drop", "swap"))])
    first, second = shown[0].axes
    mean, *seeds, other = first.lines
    assert other.get_color() == second.lines[0].get_color() != mean.get_color() == seeds[0].get_color()
    assert [list(line.get_ydata()) for line in seeds] == [[0.5, 2.0], [1.5, None]]
    assert "each seed" in shown[0].get_supxlabel()
    assert (first.lines[0].get_linestyle(), second.lines[0].get_linestyle()) == ("-", "None")
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["drop", "swap"]
