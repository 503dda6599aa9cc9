"""Does a JSON value have the shape that a type says? For files that an earlier stage wrote."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

NONE = type(None)
NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NONE: "null"}


@dataclass(frozen=True)
class Range:
    """Limits of a number, as an annotation: `Annotated[int, Range(0, 9)]`."""

    low: float
    high: float


@dataclass(frozen=True)
class OneOf:
    """The values that a text may have, as an annotation."""

    values: tuple[str, ...]


# What counts something: rows, updates, tokens.
Count = Annotated[int, Range(0, 10**8)]
Share = Annotated[float, Range(0.0, 1.0)]
# A log-prob, a margin: neither NaN nor infinite.
Finite = Annotated[float, Range(-1e300, 1e300)]


def parse(value: Any, kind: Any, name: str = "") -> Any:
    """`value`, read from JSON, as `kind`: a dataclass, a TypedDict, a dict, list or union of those,
    Annotated with a Range or OneOf, or a plain type. A dataclass comes back as its instance.

    Keys that a TypedDict does not name are kept; keys that a dataclass does not name are a fault.
    Raises ValueError that names the key at fault; `name` is the dotted key of `value` itself.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        within = _within if isinstance(arguments[1], Range) else _one_of
        return within(parse(value, arguments[0], name), arguments[1], name)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, arguments, name)
    if is_dataclass(kind) or typing.is_typeddict(kind):
        return _record(value, kind, name)
    if origin is dict:
        return {k: parse(v, arguments[1], _below(name, k)) for k, v in _mapping(value, name)}
    if origin is list:
        _require(isinstance(value, list), value, "a list", name)
        return [parse(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    _require(type(value) is kind, value, NAMES[kind], name)
    return value


def _within(value: Any, limits: Range, name: str) -> Any:
    if not limits.low <= value <= limits.high:  # also NaN
        raise ValueError(f'"{name}" is not between {limits.low:g} and {limits.high:g}')
    return value


def _one_of(value: Any, choices: OneOf, name: str) -> Any:
    if value not in choices.values:
        raise ValueError(f'"{name}" is not one of {", ".join(choices.values)}')
    return value


def _any_of(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """The last fault when no kind fits; null goes first, so that it is never that one."""
    if value is None and NONE in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not NONE)
    for kind in others:
        try:
            return parse(value, kind, name)
        except ValueError:
            continue
    return parse(value, last, name)


def _record(value: Any, kind: Any, name: str) -> Any:
    fields = dict(_mapping(value, name))
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in hints:
        if key not in fields:
            raise ValueError(f'lacks "{_below(name, key)}"; another version may have written it')
    parsed = {key: parse(fields[key], hint, _below(name, key)) for key, hint in hints.items()}
    if typing.is_typeddict(kind):
        return {**fields, **parsed}
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(f'has "{_below(name, unknown[0])}"; another version may have written it')
    return kind(**parsed)


def _mapping(value: Any, name: str) -> Any:
    _require(isinstance(value, Mapping), value, "an object", name)
    return value.items()


def _below(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _require(condition: bool, value: Any, expected: str, name: str) -> None:
    if not condition:
        kind = NAMES.get(type(value), type(value).__name__)
        what = f'"{name}"' if name else "the file"
        raise ValueError(f"{what} must be {expected}, not {kind}")
