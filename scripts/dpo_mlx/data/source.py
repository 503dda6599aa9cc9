"""Reads the questions and answers of `data.source`, whatever their format."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..files.errors import UserError
from ..files.text import shown
from . import source_files, source_rows
from .questions import Question

# Bad rows that one message names.
NAMED = 10
SKIP = "data.skip_bad_rows: true"
# The part of a fault that differs from row to row.
_DETAIL = re.compile(r"(, found | at column | \(|;).*", re.DOTALL)


@dataclass(frozen=True)
class BadRow:
    """A row without a question and an answer: where it is, and what is wrong with it."""

    place: str
    fault: str


@dataclass(frozen=True)
class Source:
    """The questions of a source, and what it was taken for."""

    description: str
    questions: list[Question]
    bad_rows: list[BadRow]

    def notes(self) -> list[str]:
        """Lines about the bad rows that were skipped."""
        if not self.bad_rows:
            return []
        return [*_named(self.bad_rows), f"skipped {_counts(self.bad_rows)} ({SKIP})"]


def read(path: Path, skip_bad_rows: bool = False) -> Source:
    """Read a source: a file of any accepted format, or a folder of text files.

    Raises UserError when the source cannot be read, or no row can be used, or, without
    `skip_bad_rows`, some row cannot: it names the first NAMED, and counts all by reason.
    """
    kind, rows = source_files.read(path)
    questions: list[Question] = []
    bad_rows: list[BadRow] = []
    formats: Counter[str] = Counter()
    for row in rows:
        try:
            if row.fault:
                raise ValueError(row.fault)
            row_format, question = source_rows.parse(row.fields, row.line)
        except ValueError as error:
            bad_rows.append(BadRow(row.place, str(error)))
        else:
            questions.append(question)
            formats[row_format] += 1
    if bad_rows and not (skip_bad_rows and questions):
        raise UserError(_explain(bad_rows, shown(path), bool(questions)))
    counts = "; ".join(f"{count} with {name}" for name, count in formats.items())
    return Source(f"{shown(path)}: read as {kind}; rows: {counts}", questions, bad_rows)


def _explain(bad_rows: list[BadRow], name: str, some_are_good: bool) -> str:
    """The error for bad rows: one line for a single one, else a line for each and their counts."""
    remedy = f"to go on without such rows, set {SKIP}" if some_are_good else "no row is left"
    if len(bad_rows) == 1:
        return f"{_named(bad_rows)[0]}; {remedy}"
    return "\n".join([*_named(bad_rows), f"{name}: {_counts(bad_rows)}; {remedy}"])


def _named(bad_rows: list[BadRow]) -> list[str]:
    return [f"{row.place}: {row.fault}" for row in bad_rows[:NAMED]]


def _counts(bad_rows: list[BadRow]) -> str:
    """How many bad rows there are, in all and by reason."""
    reasons = Counter(_DETAIL.sub("", row.fault) for row in bad_rows)
    listed = "; ".join(f"{count} x {fault}" for fault, count in reasons.most_common())
    return f"{len(bad_rows)} bad rows: {listed}"
