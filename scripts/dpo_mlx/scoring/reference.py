"""The reference: log-probs of every pair before DPO, computed once and stored with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from ..data.encoding import EncodedAnswer, EncodedPair
from ..files import fingerprint, jsonl, ownership, records
from ..files.errors import UserError
from ..files.fingerprint import Fingerprint
from ..files.schema import Count, Finite
from .losses import Sides


class ReferenceRow(TypedDict):
    """A row of the stored reference: the pair's line in its file, and log-probs in nats."""

    line: Count
    chosen: Finite
    rejected: Finite


def load_or_compute(
    folder: Path,
    name: str,
    pairs: list[EncodedPair],
    inputs: Fingerprint,
    log_probs: Callable[[list[EncodedAnswer]], list[float]],
    at_once: int = 1,
    progress: Callable[[int], object] = lambda pairs_done: None,
) -> list[Sides[float]]:
    """log p(answer | prompt) of both sides of each pair, in nats, from `folder`/`name`.jsonl or by
    `log_probs`, which is called for `at_once` pairs at a time.

    `inputs` is everything that determines the values. If the file was made from other inputs, this
    function starts it again; if an interrupted run left a part of it, it goes on from there. It
    calls progress(pairs_done) each time it has added pairs. Raises UserError for a file that is
    damaged or belongs to other pairs.
    """
    rows_path, stamp_path = folder / f"{name}.jsonl", folder / f"{name}.inputs.json"
    if not fingerprint.is_current(stamp_path, inputs, [rows_path]):
        jsonl.write(rows_path, [])
        fingerprint.write(stamp_path, inputs)
    rows = _read(rows_path, pairs)
    with ownership.growing(rows_path):
        for start in range(len(rows), len(pairs), at_once):
            group = pairs[start : start + at_once]
            values = iter(log_probs([side for pair in group for side in pair.sides]))
            new_rows: list[ReferenceRow] = [
                {"line": pair.line, "chosen": next(values), "rejected": next(values)}
                for pair in group
            ]
            jsonl.append(rows_path, new_rows)
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


def is_complete(folder: Path, name: str, count: int, inputs: Fingerprint) -> bool:
    """Whether the reference of all `count` pairs is stored, made from these inputs."""
    rows_path = folder / f"{name}.jsonl"
    return fingerprint.is_current(folder / f"{name}.inputs.json", inputs, [rows_path]) and (
        len(records.read_rows(rows_path, ReferenceRow, remedy(folder))) == count
    )


def changes(folder: Path, name: str, inputs: Fingerprint) -> list[str]:
    """How `inputs` differ from those of the stored file. An empty list if nothing is stored."""
    old = fingerprint.read(folder / f"{name}.inputs.json")
    return [] if old is None else fingerprint.differences(old, inputs)
