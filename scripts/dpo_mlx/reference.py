"""The reference: the base model's log-probs of every pair, computed once and kept with a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from . import fingerprint, jsonl, ownership, records
from .errors import UserError
from .fingerprint import Fingerprint
from .pairs import EncodedPair, Sequence
from .typed import Count, Finite


@dataclass(frozen=True)
class Reference:
    """log p(answer | prompt) of both sides under the base model, summed, in nats."""

    chosen: float
    rejected: float


class ReferenceRow(TypedDict):
    """A row of the stored reference: the pair's line in its file, and both log-probs in nats."""

    line: Count
    chosen: Finite
    rejected: Finite


def load_or_compute(
    folder: Path,
    name: str,
    pairs: list[EncodedPair],
    inputs: Fingerprint,
    log_probs: Callable[[list[Sequence]], list[float]],
    at_once: int = 1,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Reference]:
    """The reference of `pairs`, one each, from `folder`/`name`.jsonl or by `log_probs`,
    `at_once` pairs at a time.

    `inputs` is everything that determines the values; when it is not what the file was made of,
    the file is made anew. Finished pairs of an interrupted run are taken up again. Calls
    progress(pairs done) after each time.
    """
    rows_path, stamp_path = folder / f"{name}.jsonl", folder / f"{name}.inputs.json"
    if not fingerprint.is_current(stamp_path, inputs, [rows_path]):
        jsonl.write(rows_path, [])
        fingerprint.write(stamp_path, inputs)
    rows = _read(rows_path, pairs)
    with ownership.growing(rows_path):
        for start in range(len(rows), len(pairs), at_once):
            some = pairs[start : start + at_once]
            found = iter(log_probs([side for pair in some for side in pair.sides]))
            more: list[ReferenceRow] = [
                {"line": p.line, "chosen": next(found), "rejected": next(found)} for p in some
            ]
            jsonl.append(rows_path, more)
            rows += more
            progress(len(rows))
    return [Reference(row["chosen"], row["rejected"]) for row in rows]


def _read(path: Path, pairs: list[EncodedPair]) -> list[ReferenceRow]:
    """The rows that are there. Raises UserError unless they are of the first of these pairs."""
    rows: list[ReferenceRow] = records.read_rows(path, ReferenceRow, remedy(path.parent))
    if [row["line"] for row in rows] != [pair.line for pair in pairs][: len(rows)]:
        raise UserError(f"{path}: its rows are not of these pairs; {remedy(path.parent)}")
    return rows


def remedy(folder: Path) -> str:
    return f"move {folder} away and run the same command again"


def is_complete(folder: Path, name: str, count: int, inputs: Fingerprint) -> bool:
    """Whether all `count` pairs are there, made of these inputs."""
    rows_path = folder / f"{name}.jsonl"
    return fingerprint.is_current(folder / f"{name}.inputs.json", inputs, [rows_path]) and (
        len(records.read_rows(rows_path, ReferenceRow, remedy(folder))) == count
    )


def changes(folder: Path, name: str, inputs: Fingerprint) -> list[str]:
    """What differs between `inputs` and those of the stored file; nothing when there is none."""
    old = fingerprint.read(folder / f"{name}.inputs.json")
    return [] if old is None else fingerprint.differences(old, inputs)
