"""Weight names as rows of data, read both ways.

A row names one tensor of ours and the tensors of a file that hold it. `{i}` stands for the layer and `{e}` for the
expert. Reading and writing go through the same row:

    Row("layers.{i}.mixer.qkv_proj.weight", ("h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"), rows(8, 2, 2))

`only` restricts a row to the layers with that mixer or feed-forward.

Several rows may name the same tensor of ours: writing uses the first, reading the first that the file has.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from statespan.errors import CheckpointError
from statespan.models.layer_pattern import LayerSpec

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]

LISTED = 12  # names of each kind that an error spells out


@dataclass(frozen=True)
class Part:
    """A piece of one of our tensors, and the piece of a file's tensor that holds it."""

    ours: Index
    name: str  # in the file
    shape: Shape  # of the whole tensor in the file
    theirs: Index = ()
    decode: Callable[[Tensor], Tensor] | None = None  # their values to ours; such rows are only read


Transform = Callable[[tuple[str, ...], Shape], list[Part]]


def same(names: tuple[str, ...], shape: Shape) -> list[Part]:
    """One tensor in the file, equal to ours."""
    return [Part((), names[0], shape)]


def rows(*sizes: int) -> Transform:
    """The file's tensors are consecutive blocks of our rows, with these numbers of rows."""

    def transform(names: tuple[str, ...], shape: Shape) -> list[Part]:
        return _blocks(names, sizes, (), shape)

    return transform


def equal_rows(names: tuple[str, ...], shape: Shape) -> list[Part]:
    """The file's tensors are consecutive blocks of our rows, all of one size."""
    return _blocks(names, [shape[0] // len(names)] * len(names), (), shape)


def experts(names: tuple[str, ...], shape: Shape) -> list[Part]:
    """Ours stacks the experts; the file has tensors for each, equal blocks of its rows."""
    parts: list[Part] = []
    for expert in range(shape[0]):
        own = tuple(name.replace("{e}", str(expert)) for name in names)
        parts += _blocks(own, [shape[1] // len(names)] * len(names), (expert,), shape[1:])
    return parts


def swapped_halves(names: tuple[str, ...], shape: Shape) -> list[Part]:
    """One tensor in the file, with the two halves of our rows in the other order."""
    half = shape[0] // 2
    first, second = slice(0, half), slice(half, shape[0])
    return [Part((first,), names[0], shape, (second,)), Part((second,), names[0], shape, (first,))]


def decay(names: tuple[str, ...], shape: Shape) -> list[Part]:
    """The file holds A = -exp(A_log) (vLLM) where ours holds A_log. Only read."""
    return [Part((), names[0], shape, decode=lambda A: torch.log(-A.float()))]


def _blocks(names: tuple[str, ...], sizes: Sequence[int], index: Index, shape: Shape) -> list[Part]:
    if len(names) == 1:
        return [Part(index, names[0], shape)]
    parts: list[Part] = []
    start = 0
    for name, size in zip(names, sizes, strict=True):
        parts.append(Part((*index, slice(start, start + size)), name, (size, *shape[1:])))
        start += size
    return parts


@dataclass(frozen=True)
class Row:
    """One tensor of ours and where a file keeps it."""

    ours: str
    theirs: str | tuple[str, ...]
    transform: Transform = same
    only: str | None = None  # the mixer or feed-forward of the layers for which it holds; None: all

    def parts(self, layer: int, shape: Shape) -> list[Part]:
        """Where the pieces of our tensor of this layer and shape are."""
        names = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return self.transform(tuple(name.replace("{i}", str(layer)) for name in names), shape)


def candidates(
    table: Iterable[Row], layers: Sequence[LayerSpec], ours: Mapping[str, Shape]
) -> dict[str, list[list[Part]]]:
    """For each tensor of ours, where each of its rows says that it is; rows for tensors that we lack drop out."""
    found: dict[str, list[list[Part]]] = {name: [] for name in ours}
    for row in table:
        for layer, spec in enumerate(layers if "{i}" in row.ours else layers[:1]):
            if row.only not in (None, spec.mixer, spec.feed_forward):
                continue
            name = row.ours.replace("{i}", str(layer))
            if name in found:
                found[name].append(row.parts(layer, ours[name]))
    return found


def match(found: Mapping[str, list[list[Part]]], theirs: Mapping[str, Shape]) -> dict[str, list[Part]]:
    """The parts to read for each tensor of ours; every tensor of the file is used exactly once.

    Args:
        found: from `candidates`.
        theirs: names and shapes of the file's tensors.
    Raises:
        CheckpointError: lists the names that are missing, left over, or of another shape.
    """
    chosen = {ours: _choose(ours, options, theirs) for ours, options in found.items()}
    parts = [part for group in chosen.values() for part in group]
    missing = [f"{p.name} {list(p.shape)}" for p in _unique(parts) if p.name not in theirs]
    wrong = [
        f"{p.name} is {list(theirs[p.name])} and should be {list(p.shape)}"
        for p in _unique(parts)
        if p.name in theirs and tuple(theirs[p.name]) != p.shape
    ]
    used = {part.name for part in parts}
    left = [f"{name} {list(shape)}" for name, shape in theirs.items() if name not in used]
    problems = [
        f"{title}: {_listed(names)}"
        for title, names in (("missing", missing), ("left over", left), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError("; ".join(problems))
    return chosen


def _choose(ours: str, options: list[list[Part]], theirs: Mapping[str, Shape]) -> list[Part]:
    if not options:
        raise CheckpointError(f"this format has no name for {ours}")
    return next((parts for parts in options if any(part.name in theirs for part in parts)), options[0])


def _unique(parts: Iterable[Part]) -> list[Part]:
    return list({part.name: part for part in parts}.values())


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
