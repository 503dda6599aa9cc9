"""Is a stage's output still what its inputs and settings would make? Told by what went into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import jsonl, ownership, records
from .bounded import shown

# A flat mapping from the name of an input ("dpo.beta", "train pairs") to its value or digest.
Inputs = dict[str, Any]


def path(run_dir: Path, stage: str) -> Path:
    """Where a run keeps the stamp of a stage."""
    return run_dir / "stamps" / f"{stage}.json"


def read(path: Path) -> Inputs | None:
    """What went into an output, None when nothing was written. Raises UserError for a stamp that
    is damaged or not ours.
    """
    return records.read_if_there(path, Inputs)


def write(path: Path, inputs: Inputs) -> None:
    jsonl.write_json(path, inputs)


def differences(old: Inputs, new: Inputs) -> list[str]:
    """Which inputs differ: `name: old -> new` for short values, the name alone for long ones."""
    new = json.loads(json.dumps(new))  # tuples and the like as they come back from a file
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [_difference(name, old.get(name), new.get(name)) for name in names]


def is_current(path: Path, inputs: Inputs, outputs: list[Path]) -> bool:
    """Whether `inputs` are those stamped at `path`, and every output is still there as a whole."""
    old = read(path)
    return old is not None and not differences(old, inputs) and all(map(_is_there, outputs))


def _is_there(output: Path) -> bool:
    return ownership.is_complete(output) if output.is_dir() else output.exists()


def _difference(name: str, old: Any, new: Any) -> str:
    if any(isinstance(value, dict | list) or len(str(value)) > 60 for value in (old, new)):
        return shown(name)
    return shown(f"{name}: {old} -> {new}")
