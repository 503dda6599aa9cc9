"""How training ended: `outcome.json` in a run's folder, which stage 10 writes for later stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from . import jsonl, models, ownership, records
from .errors import UserError
from .typed import Count, Share

OUTCOME, ADAPTERS, METRICS = "outcome.json", "adapters", "metrics.jsonl"  # in a run's folder


@dataclass(frozen=True)
class Outcome:
    """How training ended; `stopped` says why when it did not reach its end. `voice` is the score
    of the kept adapters' answers, `adapters` the SHA-256 of the kept adapters' tensors.
    """

    updates: Count
    kept_update: Count
    voice: Share
    stopped: list[str]
    adapters: str


def write(run: Path, outcome: Outcome) -> None:
    jsonl.write_json(run / OUTCOME, asdict(outcome))


def read(run: Path) -> Outcome:
    """Raises UserError when stage 10 has not come to its end, or the file is damaged."""
    path = run / OUTCOME
    if not path.exists():
        raise UserError(f"{path}: no such file; run 10_train_dpo.py first")
    outcome: Outcome = records.read(path, Outcome)
    if outcome.kept_update > outcome.updates:
        raise UserError(
            f"{path}: keeps update {outcome.kept_update} of {outcome.updates}; {records.AGAIN}"
        )
    return outcome


def require_adapters(run: Path) -> Path:
    """The folder of the kept adapters. Raises UserError unless it holds what this run trained."""
    folder = run / ADAPTERS
    if not (folder / models.ADAPTERS).is_file():
        raise UserError(f"{folder}: no adapters there; run 10_train_dpo.py first")
    remedy = f"move {folder} away and run 10_train_dpo.py again"
    for name in (models.ADAPTERS, models.ADAPTER_CONFIG):
        ownership.require(folder / name, remedy)
    if jsonl.digest(folder / models.ADAPTERS) != read(run).adapters:
        raise UserError(f"{folder}: these are not the adapters that this run trained; {remedy}")
    return folder
