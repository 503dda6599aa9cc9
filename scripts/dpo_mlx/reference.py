"""The reference: the base model's log-probs of every pair, computed once and kept with a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import jsonl, stamp
from .pairs import EncodedPair, Sequence


@dataclass(frozen=True)
class Reference:
    """log p(answer | prompt) of both sides under the base model, summed, in nats."""

    chosen: float
    rejected: float


def load_or_compute(
    folder: Path,
    name: str,
    pairs: list[EncodedPair],
    inputs: stamp.Inputs,
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
    if not stamp.is_current(stamp_path, inputs, [rows_path]):
        jsonl.write(rows_path, [])
        stamp.write(stamp_path, inputs)
    rows = jsonl.read_whole_lines(rows_path, ("chosen", "rejected"))
    for start in range(len(rows), len(pairs), at_once):
        some = pairs[start : start + at_once]
        found = iter(log_probs([side for pair in some for side in pair.sides]))
        more = [{"line": p.line, "chosen": next(found), "rejected": next(found)} for p in some]
        jsonl.append(rows_path, more)
        rows += more
        progress(len(rows))
    return [Reference(row["chosen"], row["rejected"]) for row in rows]


def is_complete(folder: Path, name: str, count: int, inputs: stamp.Inputs) -> bool:
    """Whether all `count` pairs are there, made of these inputs."""
    rows_path = folder / f"{name}.jsonl"
    return stamp.is_current(folder / f"{name}.inputs.json", inputs, [rows_path]) and (
        len(jsonl.read_whole_lines(rows_path)) == count
    )


def changes(folder: Path, name: str, inputs: stamp.Inputs) -> list[str]:
    """What differs between `inputs` and those of the stored file; nothing when there is none."""
    old = stamp.read(folder / f"{name}.inputs.json")
    return [] if old is None else stamp.differences(old, inputs)
