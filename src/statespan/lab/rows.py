"""Rows grouped and averaged: what most reports do with them."""

from collections.abc import Iterable, Mapping, Sequence

from statespan.lab.experiment import Line, Row


def of(rows: Sequence[Row], **fields: object) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def values(rows: Sequence[Row], name: str, **fields: object) -> list[float]:
    """The field `name` of the rows with these values, where it is there."""
    return [row[name] for row in of(rows, **fields) if row.get(name) is not None]


def mean(numbers: Sequence[float]) -> float | None:
    """Their mean; None of nothing."""
    return sum(numbers) / len(numbers) if numbers else None


def mean_of(rows: Sequence[Row], name: str, **fields: object) -> float | None:
    """The mean of the field `name` over the rows with these values (the seeds); None where there are none."""
    return mean(values(rows, name, **fields))


def spread(rows: Sequence[Row], name: str, digits: int = 1, **fields: object) -> str | None:
    """Mean and range over the seeds as text, such as "97.2 (95.0 to 99.1)"; one seed: its value."""
    numbers = values(rows, name, **fields)
    if not numbers:
        return None
    center = f"{sum(numbers) / len(numbers):.{digits}f}"
    return center if len(numbers) == 1 else f"{center} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


def told(figures: Mapping[str, float | str | None], digits: int = 1) -> str:
    """Figures by name as text, such as "Mamba 99.8, S4D 36.8"; those that are missing are left out."""
    cells = {k: v if isinstance(v, str) else f"{v:.{digits}f}" for k, v in figures.items() if v is not None}
    return ", ".join(f"{name} {figure}" for name, figure in cells.items())


def line(label: str, rows: Sequence[Row], x: str, y: str, **fields: object) -> Line:
    """A curve of field `y` over field `x`: the mean over the seeds, and each seed's own."""
    chosen = [row for row in of(rows, **fields) if row.get(y) is not None]
    xs = sorted({row[x] for row in chosen})

    def curve(**seed: int) -> list[float | None]:
        return [mean_of(chosen, y, **{x: place}, **seed) for place in xs]

    seeds = sorted({row["seed"] for row in chosen if "seed" in row})
    return Line(label, xs, curve(), [curve(seed=seed) for seed in seeds] if len(seeds) > 1 else ())


def lines(variants: Iterable[str], rows: Sequence[Row], x: str, y: str, **fields: object) -> list[Line]:
    """A `line` for each variant."""
    return [line(variant, rows, x, y, variant=variant, **fields) for variant in variants]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The exponent k of y ~ x^k by least squares of the logarithms; None of fewer than two points."""
    import numpy as np

    if len(xs) < 2:
        return None
    return float(np.polyfit(np.log(np.asarray(xs, float)), np.log(np.asarray(ys, float)), 1)[0])


def ordered(first: float | None, second: float | None, margin: float = 0.0) -> bool | None:
    """Whether the first is larger than the second by more than `margin`; None where one is missing."""
    return None if first is None or second is None else first > second + margin


def all_of(*answers: bool | None) -> bool | None:
    """False where one is False, None where one is missing, else True."""
    if False in answers:
        return False
    return None if None in answers else True
