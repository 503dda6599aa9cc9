"""Reads what an earlier stage wrote: whole, of the right shape, and unchanged since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import jsonl, ownership, schema
from .errors import UserError

RUN_AGAIN = "move it away, and the stage that makes it runs again"


def read(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """The JSON value of a file as `kind` (see `schema.parse`).

    Raises UserError, ending in `remedy`, when it is not there, broken, of another shape, or was
    not written by the pipeline.
    """
    return checked(path, jsonl.read_json(path, remedy), kind, remedy)


def checked(path: Path, value: Any, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """The same for a file whose JSON value is already in memory."""
    try:
        record = schema.parse(value, kind)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {remedy}") from error
    ownership.require(path, remedy)
    return record


def read_if_there(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> Any:
    """The same; None when there is no such file."""
    return read(path, kind, remedy) if path.exists() else None


def read_rows(path: Path, kind: Any, remedy: str = RUN_AGAIN) -> list[Any]:
    """The rows of a file that grew by `jsonl.append`, each as `kind`; a last row that a kill has
    torn is cut off the file first.

    Raises UserError as `read` does, with the line at fault.
    """
    rows = []
    for number, row in enumerate(jsonl.read_whole_lines(path, remedy), start=1):
        try:
            rows.append(schema.parse(row, kind))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; {remedy}") from error
    ownership.require(path, remedy)
    return rows
