"""The date that a run's prompts contain, for chat templates that write one.

It is stored beside the pairs: the rejected answers were sampled with it, and all runs that share
the pairs are trained with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import TypedDict

from ..files import jsonl, records
from ..files.errors import UserError
from ..files.run_folder import PairFiles
from ..files.text import shown
from .chat_template import ChatTemplate


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


def keep(files: PairFiles, template: ChatTemplate) -> Iterator[str]:
    """Store the template's date, unless one is stored, and yield a note. Does nothing for a
    template that writes no date.
    """
    if not template.writes_date():
        return
    if not files.prompt_date.exists():
        files.prompt_date.parent.mkdir(parents=True, exist_ok=True)
        jsonl.write_json(files.prompt_date, {"date": template.day.isoformat()})
    yield (
        f"the chat template writes the date; with these pairs it is always {template.day} "
        f"({shown(files.prompt_date)})"
    )
