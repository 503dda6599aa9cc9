"""The date that a run's prompts contain, for chat templates that write one.

It is stored beside the pairs: the rejected answers were sampled with it, and all runs that share
the pairs are trained with it.
"""

from __future__ import annotations

from datetime import date
from typing import TypedDict

from ..files import jsonl, records
from ..files.errors import UserError
from ..files.run_folder import PairFiles


class _Stored(TypedDict):
    """The content of the file: the date as YYYY-MM-DD."""

    date: str


def read(files: PairFiles) -> date | None:
    """The stored date. None if there is none. Raises UserError when the file is damaged or not
    ours.
    """
    stored: _Stored | None = records.read_if_exists(files.prompt_date, _Stored)
    if stored is None:
        return None
    try:
        return date.fromisoformat(stored["date"])
    except ValueError as error:
        raise UserError(f"{files.prompt_date}: {error}; {records.RUN_AGAIN}") from error


def write(files: PairFiles, day: date) -> None:
    files.prompt_date.parent.mkdir(parents=True, exist_ok=True)
    jsonl.write_json(files.prompt_date, {"date": day.isoformat()})
