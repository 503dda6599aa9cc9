"""Reads files that an earlier stage wrote, and checks their types and that nobody changed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import jsonl, ownership, schema
from .errors import UserError

RUN_AGAIN = "move it away, and the stage that writes it runs again"


def read(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """Read a JSON file as the type `kind` (see `schema.parse`).

    Raises UserError, ending in `remedy`, when the file is missing, broken, of another type, or not
    ours.
    """
    return parse(path, jsonl.read_json(path, remedy), kind, remedy)


def parse(path: Path, value: Any, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """The same, for a file whose JSON value is already in memory."""
    try:
        record = schema.parse(value, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    ownership.require(path, remedy)
    return record


def read_if_exists(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """The same, but returns None when the file does not exist."""
    return read(path, kind, remedy) if path.exists() else None


def read_rows(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> list[Any]:
    """Read a file that `jsonl.append` wrote, each row as the type `kind`, after cutting a torn last
    row off the file.

    Raises UserError like `read`, with the line number.
    """
    rows = []
    for number, row in enumerate(jsonl.read_whole_lines(path, remedy), start=1):
        try:
            rows.append(schema.parse(row, kind))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; {remedy}") from error
    ownership.require(path, remedy)
    return rows
