"""Frozen dataclasses to and from plain JSON values and `key=value` text, strict about names and types.

One implementation serves every config of the package: unknown keys are refused with the nearest known one,
wrong types name the field, nested dataclasses are addressed with dots (`model.hidden_size=256`).
"""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from statespan.errors import UnknownName, UserError

T = TypeVar("T")
_hints = functools.cache(typing.get_type_hints)


def to_plain(value: Any) -> Any:
    """The JSON value of a dataclass: nested objects, lists, numbers, text; infinities become text."""
    if hasattr(value, "from_text"):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value


def from_plain(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build `cls` from JSON values. Raises UnknownName for a key it lacks, UserError for a wrong type."""
    where = where or cls.__name__
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: expected an object with fields, got {type(mapping).__name__}")
    hints = _hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # T is always a dataclass here
    for key in mapping:
        if key not in known:
            raise UnknownName(f"key in {where}", key, known)
    values = {key: convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).removeprefix(cls.__name__ + '.__init__() ')}") from None


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or UserError that names the field `where`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise UnknownName(f"value of {where}", str(value), [str(a) for a in arguments])
        return value
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and hasattr(hint, "from_text"):
            return hint.from_text(value)  # type: ignore[union-attr]  # the class offers its own short text form
        return value if isinstance(value, hint) else from_plain(hint, value, where)  # type: ignore[arg-type]
    return _convert_scalar(hint, value, where)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in arguments:
        return None
    options = [a for a in arguments if a is not types.NoneType]
    for option in options[:-1]:
        try:
            return convert(option, value, where)
        except UserError:
            continue
    return convert(options[-1], value, where)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{where}: expected a list, got {value!r}")
    items = list(value)
    if len(arguments) == 2 and arguments[1] is ...:
        return tuple(convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(items))
    if len(items) != len(arguments):
        raise UserError(f"{where}: expected {len(arguments)} values, got {len(items)}")
    return tuple(convert(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(arguments, items, strict=True)))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where}: expected a number, got {value!r}") from None
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is int and isinstance(value, bool):
        raise UserError(f"{where}: expected int, got {value!r}")
    if hint is Any or isinstance(value, hint):
        return value
    raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")


def apply_overrides(config: T, assignments: Iterable[str]) -> T:
    """A copy of `config` with `name=value` assignments applied; dots reach into nested dataclasses.

    Values are JSON where they parse as JSON (`3`, `1e-3`, `true`, `null`, `[1, 2]`), otherwise text. The result is
    built once, after all assignments, so their order does not matter to checks across fields.
    """
    plain = to_plain(config)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"{assignment!r}: expected key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *parents, leaf = name.split(".")
        fields = plain
        for parent in parents:
            if fields.get(parent) is None:
                fields[parent] = {}
            fields = fields[parent]
            if not isinstance(fields, dict):
                raise UserError(f"{assignment!r}: {parent} has no fields")
        fields[leaf] = value
    return from_plain(type(config), plain)
