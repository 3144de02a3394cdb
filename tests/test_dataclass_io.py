"""Config reading: strict names and types, overrides, round trips."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from statespan.dataclass_io import apply_overrides, from_plain, to_plain
from statespan.errors import UnknownName, UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True)
class Outer:
    width: int
    inner: Inner = field(default_factory=Inner)
    limits: tuple[float, float] = (0.0, math.inf)
    names: tuple[str, ...] = ()
    folder: Path | None = None
    flag: bool = False


def test_round_trip_through_json() -> None:
    value = Outer(3, Inner(0.5, "constant"), (1.0, math.inf), ("a", "b"), Path("x/y"), True)
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value)))) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "unknown key in Outer: 'widht'; did you mean 'width'?"),
        ({"width": 3, "inner": {"rat": 1}}, "unknown key in Outer.inner: 'rat'; did you mean 'rate'?"),
        ({"width": "3"}, "Outer.width: expected int, got '3'"),
        ({"width": True}, "Outer.width: expected int, got True"),
        ({"width": 3, "inner": {"rate": "fast"}}, "Outer.inner.rate: expected a number, got 'fast'"),
        (
            {"width": 3, "inner": {"kind": "cosin"}},
            "unknown value of Outer.inner.kind: 'cosin'; did you mean 'cosine'?",
        ),
        ({"width": 3, "limits": [1.0]}, "Outer.limits: expected 2 values, got 1"),
        ({"width": 3, "names": "abc"}, "Outer.names: expected a list, got 'abc'"),
        ({"width": 3, "inner": 5}, "Outer.inner: expected an object with fields, got int"),
        ({"width": 3, "flag": 1}, "Outer.flag: expected bool, got 1"),
        ({}, "Outer: missing 1 required positional argument: 'width'"),
    ],
)
def test_mistakes_are_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_plain(Outer, values)
    assert str(caught.value) == message


def test_overrides() -> None:
    changed = apply_overrides(
        Outer(3), ["width=5", "inner.rate=1e-3", "inner.kind=constant", 'names=["x"]', "folder=a b", "flag=true"]
    )
    assert changed == Outer(5, Inner(1e-3, "constant"), names=("x",), folder=Path("a b"), flag=True)
    assert apply_overrides(changed, ["folder=null"]).folder is None


@pytest.mark.parametrize("text", ["inner.rte=1", "inner=3", "width", "width.x=1", "width=2.5", "widths=1"])
def test_bad_overrides_are_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(Outer(3), [text])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UnknownName) == (text in ("inner.rte=1", "widths=1"))
