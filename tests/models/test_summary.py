"""The printed summary: the figures it must show, folding of layers, and plain text outside a terminal."""

import io

import pytest
from rich.console import Console

from statespan.models.layer_pattern import LayerSpec, pattern_from_text
from statespan.models.presets import PRESETS, preset
from statespan.models.summary import bytes_text, fold_layers, length_text, number_text, print_summary


def printed(name: str, *lengths: int, terminal: bool = False, width: int = 80) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    print_summary(preset(name), lengths, title=name, console=console)
    return file.getvalue()


def row(text: str, first: str) -> list[str]:
    return next(line for line in text.splitlines() if line.split()[:1] == [first]).split()


def test_jamba_against_mixtral_at_256k() -> None:
    assert row(printed("jamba-v0.1", 4096, 262144), "256K")[-6:-4] == ["4", "GiB"]
    assert row(printed("mixtral-8x7b", 4096, 262144), "256K")[-6:-4] == ["32", "GiB"]
    assert row(printed("jamba-1.5-large", 262144), "256K")[-6:-4] == ["9", "GiB"]


def test_parameters_are_exact() -> None:
    text = printed("jamba-v0.1", 4096)
    assert "51,570,323,328 51.57 B" in text
    assert "12,110,311,296 12.11 B" in text


def test_plain_outside_a_terminal() -> None:
    text = printed("mamba2-hybrid-8b", 4096)
    assert text.isascii() and "\x1b" not in text
    assert all(line == line.rstrip() or line.strip() for line in text.splitlines())


@pytest.mark.parametrize("name", ["jamba-v0.1", "jamba-1.5-large", "mixtral-8x7b", "mamba-130m"])
def test_fits_a_terminal_of_80_columns(name: str) -> None:
    assert "…" not in printed(name, 4096, 262144, terminal=True)


@pytest.mark.parametrize("name", PRESETS)
def test_folding_keeps_every_layer(name: str) -> None:
    layers = preset(name).layers
    unfolded: dict[int, LayerSpec] = {}
    for run in fold_layers(layers):
        for occurrence in range(run.occurrences):
            for i in range(run.length):
                index = run.start + occurrence * run.distance + i
                assert index not in unfolded
                unfolded[index] = run.spec
    assert [unfolded[i] for i in range(len(layers))] == list(layers)


def test_folding_is_short() -> None:
    assert [str(run) for run in fold_layers(preset("jamba-v0.1").layers)][:2] == ["0, 8, .. 24", "1, 9, .. 25"]
    assert len(fold_layers(preset("jamba-1.5-large").layers)) == 8
    assert [str(run) for run in fold_layers(preset("mamba-130m").layers)] == ["0, 1, .. 23"]
    assert [str(run) for run in fold_layers(pattern_from_text("MM*MM*m"))] == ["0-1, 3-4", "2, 5", "6"]


def test_units() -> None:
    assert number_text(12_110_311_296) == "12.11 B"
    assert number_text(7) == "7"
    assert bytes_text(4 * 2**30) == "4 GiB"
    assert bytes_text(0) == "0 B"
    assert length_text(262144) == "256K"
    assert length_text(1000) == "1000"
