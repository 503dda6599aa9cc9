"""Preference pairs and their file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import jsonl
from ..files.errors import UserError
from ..files.text import shown

# Why an answer ended: the model ended its turn, or the token limit cut it.
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Pair:
    """One line of a pair file. `line` counts from 1."""

    prompt: str
    chosen: str
    rejected: str
    rejected_finish: str = STOP
    line: int = 0


def read(path: Path) -> list[Pair]:
    """Read all pairs of a file. Other keys of a row are ignored.

    Raises UserError with `path:line` for a row that is not a pair.
    """
    return [
        _pair(row, line, shown(path))
        for line, row in jsonl.read(path, remedy="make it with 06_generate_dpo_pairs.py")
    ]


def _pair(row: dict[str, Any], line: int, path: str) -> Pair:
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(
                f'{path}:{line}: the field "{key}" must be text that is not empty; fill it in'
            )
        if "\0" in row[key] and key != "rejected":  # a model can write any character
            raise UserError(
                f'{path}:{line}: the field "{key}" contains a NUL character (\\u0000); remove it'
            )
    finish = row.get("rejected_finish", STOP)
    if finish not in (STOP, LENGTH):
        raise UserError(f'{path}:{line}: "rejected_finish" must be "{STOP}" or "{LENGTH}"')
    return Pair(row["prompt"], row["chosen"], row["rejected"], finish, line)
