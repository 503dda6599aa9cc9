"""Checks a JSON value against a type, for files that an earlier stage wrote."""

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
    """The limits of a number, as an annotation: `Annotated[int, Range(0, 9)]`."""

    low: float
    high: float


@dataclass(frozen=True)
class OneOf:
    """The allowed values of a text, as an annotation."""

    values: tuple[str, ...]


# A number of rows, updates or tokens.
Count = Annotated[int, Range(0, 10**8)]
Share = Annotated[float, Range(0.0, 1.0)]
# A log-prob or a margin, without NaN and infinities.
Finite = Annotated[float, Range(-1e300, 1e300)]


def parse(value: Any, kind: Any, name: str = "") -> Any:
    """Convert a JSON value to the type `kind`: a dataclass, a TypedDict, a dict, list or union of
    those, a type Annotated with a Range or OneOf, or a basic type.

    A TypedDict keeps extra keys; a dataclass rejects them. Raises ValueError that names the wrong
    key. `name` is the dotted key of `value` itself.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        check = _check_range if isinstance(arguments[1], Range) else _check_choice
        return check(parse(value, arguments[0], name), arguments[1], name)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, arguments, name)
    if is_dataclass(kind) or typing.is_typeddict(kind):
        return _record(value, kind, name)
    if origin is dict:
        return {k: parse(v, arguments[1], _join(name, k)) for k, v in _mapping(value, name)}
    if origin is list:
        _require(isinstance(value, list), value, "a list", name)
        return [parse(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    _require(type(value) is kind, value, NAMES[kind], name)
    return value


def _check_range(value: Any, limits: Range, name: str) -> Any:
    if not limits.low <= value <= limits.high:  # also NaN
        raise ValueError(f'"{name}" is not between {limits.low:g} and {limits.high:g}')
    return value


def _check_choice(value: Any, choices: OneOf, name: str) -> Any:
    if value not in choices.values:
        raise ValueError(f'"{name}" is not one of {", ".join(choices.values)}')
    return value


def _any_of(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """Try each kind. Raises the last kind's ValueError when none fits; null is never the last."""
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
            raise ValueError(f'lacks "{_join(name, key)}"; another version may have written it')
    parsed = {key: parse(fields[key], hint, _join(name, key)) for key, hint in hints.items()}
    if typing.is_typeddict(kind):
        return {**fields, **parsed}
    if unknown := sorted(fields.keys() - hints.keys()):
        raise ValueError(
            f'has the unknown key "{_join(name, unknown[0])}"; another version may have written it'
        )
    return kind(**parsed)


def _mapping(value: Any, name: str) -> Any:
    _require(isinstance(value, Mapping), value, "an object", name)
    return value.items()


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _require(condition: bool, value: Any, expected: str, name: str) -> None:
    if not condition:
        kind = NAMES.get(type(value), type(value).__name__)
        subject = f'"{name}"' if name else "the file"
        raise ValueError(f"{subject} must be {expected}, not {kind}")
