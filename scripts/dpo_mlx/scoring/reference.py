"""The reference: log-probs of every pair before DPO, computed once and stored with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from ..data.encoding import EncodedAnswer, EncodedPair
from ..files import fingerprint, jsonl, ownership, records
from ..files.errors import UserError
from ..files.fingerprint import Fingerprint
from ..files.run_folder import ReferenceFiles
from ..files.schema import Count, Finite
from .losses import Sides


class ReferenceRow(TypedDict):
    """A row of the stored reference: the pair's line in its file, and log-probs in nats."""

    line: Count
    chosen: Finite
    rejected: Finite


def load_or_compute(
    files: ReferenceFiles,
    pairs: list[EncodedPair],
    current: Fingerprint,
    log_probs: Callable[[list[EncodedAnswer]], list[float]],
    at_once: int = 1,
    progress: Callable[[int], object] = lambda pairs_done: None,
) -> list[Sides[float]]:
    """log p(answer | prompt) of both sides of each pair, in nats, from `files` or by
    `log_probs`, which is called for `at_once` pairs at a time.

    `current` is the fingerprint of the values. If the stored one differs, this function starts the
    file again; if an interrupted run left a part of the file, it adds the rest. It
    calls progress(pairs_done) each time it has added pairs. Raises UserError for a file that is
    damaged or belongs to other pairs.
    """
    if not fingerprint.is_current(files.stamp, current, [files.rows]):
        jsonl.write(files.rows, [])
        fingerprint.write(files.stamp, current)
    rows = _read(files.rows, pairs)
    with ownership.growing(files.rows):
        for start in range(len(rows), len(pairs), at_once):
            group = pairs[start : start + at_once]
            values = iter(log_probs([side for pair in group for side in pair.sides]))
            new_rows: list[ReferenceRow] = [
                {"line": pair.line, "chosen": next(values), "rejected": next(values)}
                for pair in group
            ]
            jsonl.append(files.rows, new_rows)
            rows += new_rows
            progress(len(rows))
    return [Sides(row["chosen"], row["rejected"]) for row in rows]


def _read(path: Path, pairs: list[EncodedPair]) -> list[ReferenceRow]:
    """The stored rows. Raises UserError unless they belong to the first of these pairs."""
    rows: list[ReferenceRow] = records.read_rows(path, ReferenceRow, remedy(path.parent))
    if [row["line"] for row in rows] != [pair.line for pair in pairs][: len(rows)]:
        raise UserError(f"{path}: its rows belong to other pairs; {remedy(path.parent)}")
    return rows


def remedy(folder: Path) -> str:
    """What to do about a stored reference that cannot be used."""
    return f"move {folder} away and run the same command again"


def is_complete(files: ReferenceFiles, count: int, current: Fingerprint) -> bool:
    """Whether the reference of all `count` pairs is stored with this fingerprint."""
    return fingerprint.is_current(files.stamp, current, [files.rows]) and (
        len(records.read_rows(files.rows, ReferenceRow, remedy(files.folder))) == count
    )


def changes(files: ReferenceFiles, current: Fingerprint) -> list[str]:
    """How the stored fingerprint differs from `current`. An empty list if nothing is stored."""
    stored = fingerprint.read(files.stamp)
    return [] if stored is None else fingerprint.differences(stored, current)
