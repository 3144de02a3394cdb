"""Rows of weight names: both directions, and the list of names when something does not fit."""

import pytest
import torch
from torch import Tensor

from statespan.checkpoints.weight_map import (
    Part,
    Row,
    Transform,
    candidates,
    decay,
    equal_rows,
    experts,
    match,
    rows,
    same,
    swapped_halves,
)
from statespan.errors import CheckpointError
from statespan.models.layer_pattern import LayerSpec

LAYERS = (LayerSpec("mamba1", "mlp"), LayerSpec("attention", "mlp"), LayerSpec("mamba1", "moe"))


def write(parts: list[Part], ours: Tensor) -> dict[str, Tensor]:
    """What a file holds, straight from the definition of a part."""
    file = {part.name: torch.full(part.shape, torch.nan) for part in parts}
    for part in parts:
        file[part.name][part.theirs] = ours[part.ours]
    return file


def read(parts: list[Part], file: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    ours = torch.full(shape, torch.nan)
    for part in parts:
        ours[part.ours] = file[part.name][part.theirs]
    return ours


@pytest.mark.parametrize(
    ("transform", "names", "shape", "expected"),
    [
        (same, ("a",), (4, 3), lambda x: {"a": x}),
        (rows(5, 2, 2), ("q", "k", "v"), (9, 3), lambda x: {"q": x[:5], "k": x[5:7], "v": x[7:]}),
        (rows(5, 2, 2), ("q", "k", "v"), (9,), lambda x: {"q": x[:5], "k": x[5:7], "v": x[7:]}),
        (equal_rows, ("gate", "up"), (6, 3), lambda x: {"gate": x[:3], "up": x[3:]}),
        (
            experts,
            ("{e}.gate", "{e}.up"),
            (2, 6, 3),
            lambda x: {"0.gate": x[0, :3], "0.up": x[0, 3:], "1.gate": x[1, :3], "1.up": x[1, 3:]},
        ),
        (experts, ("{e}.down",), (2, 3, 4), lambda x: {"0.down": x[0], "1.down": x[1]}),
        (swapped_halves, ("fc1",), (6, 3), lambda x: {"fc1": torch.cat([x[3:], x[:3]])}),
    ],
)
def test_transforms_both_ways(transform: Transform, names: tuple[str, ...], shape: tuple[int, ...], expected) -> None:
    ours = torch.randn(shape)
    parts = transform(names, shape)
    file = write(parts, ours)
    wanted = expected(ours)
    assert file.keys() == wanted.keys()
    assert all(torch.equal(file[name], tensor) for name, tensor in wanted.items())
    assert torch.equal(read(parts, file, shape), ours)


def test_decay_is_the_logarithm_of_minus_A() -> None:
    A_log = torch.randn(4, 3)
    (part,) = decay(("mixer.A",), (4, 3))
    assert part.decode is not None
    torch.testing.assert_close(part.decode(-torch.exp(A_log)), A_log)


def test_rows_hold_for_their_layers_only() -> None:
    table = [
        Row("embed", "wte"),
        Row("layers.{i}.in", "h.{i}.ssm", only="mamba1"),
        Row("layers.{i}.in", "h.{i}.attn", only="attention"),
        Row("layers.{i}.absent", "h.{i}.absent"),
    ]
    ours = {"embed": (5,), "layers.0.in": (1,), "layers.1.in": (2,), "layers.2.in": (3,)}
    found = candidates(table, LAYERS, ours)
    names = {ours: [[part.name for part in parts] for parts in options] for ours, options in found.items()}
    assert names == {
        "embed": [["wte"]],
        "layers.0.in": [["h.0.ssm"]],
        "layers.1.in": [["h.1.attn"]],
        "layers.2.in": [["h.2.ssm"]],
    }


def test_reading_takes_the_first_row_that_the_file_has() -> None:
    found = candidates([Row("x", "new"), Row("x", "old")], LAYERS, {"x": (2,)})
    assert match(found, {"old": (2,)})["x"][0].name == "old"
    assert match(found, {"new": (2,)})["x"][0].name == "new"


def test_all_problems_are_one_error_with_names_and_shapes() -> None:
    table = [Row("a", "A"), Row("b", ("B1", "B2"), equal_rows), Row("c", "C")]
    found = candidates(table, LAYERS, {"a": (2, 3), "b": (4, 3), "c": (5,)})
    with pytest.raises(CheckpointError) as caught:
        match(found, {"A": (3, 2), "B1": (2, 3), "C": (5,), "extra.weight": (7, 8)})
    message = str(caught.value)
    assert "missing: B2 [2, 3]" in message
    assert "left over: extra.weight [7, 8]" in message
    assert "wrong shape: A is [3, 2] and should be [2, 3]" in message
    assert "\n" not in message


def test_long_lists_are_cut_with_their_count() -> None:
    with pytest.raises(CheckpointError, match=r"left over: x0 \[1\].* and 88 more$"):
        match({}, {f"x{i}": (1,) for i in range(100)})


def test_a_tensor_without_a_row_is_named() -> None:
    with pytest.raises(CheckpointError, match="no name for odd"):
        match(candidates([], LAYERS, {"odd": (1,)}), {})
