"""What stages leave in a run for later stages: the pairs' report, training's outcome, its metrics,
and fusing's report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from . import digest, jsonl, ownership, records, schema
from .errors import UserError
from .model_files import ADAPTER_CONFIG, ADAPTERS
from .run_folder import PairFiles, RunFolder
from .schema import Count, Finite, Share

# The percentiles of answer lengths in the pairs' report.
PERCENTILES = (5, 25, 50, 75, 95, 100)
LENGTHS: tuple[Literal["percentiles", "chosen", "rejected"], ...] = (
    "percentiles",
    "chosen",
    "rejected",
)


class Lengths(TypedDict):
    """Lengths of the answers in tokens, at these percentiles."""

    percentiles: list[Count]
    chosen: list[Count]
    rejected: list[Count]


class PairsReport(TypedDict):
    """Stage 06: how many pairs, what was dropped and why, answer lengths, the fingerprint."""

    train: Count
    valid: Count
    dropped: dict[str, Count]
    rejected_finish: dict[str, Count]
    tokens: Lengths
    inputs: dict[str, Any]


def read_pairs_report(files: PairFiles) -> PairsReport | None:
    """None when stage 06 has not come to its end, or was left out."""
    report: PairsReport | None = records.read_if_there(files.report, PairsReport)
    if report and any(len(report["tokens"][part]) != len(PERCENTILES) for part in LENGTHS):
        raise UserError(
            f'{files.report}: "tokens" has lists of different lengths; {records.RUN_AGAIN}'
        )
    return report


@dataclass(frozen=True)
class Outcome:
    """How training ended, after `updates` of both phases.

    `sft_updates` is the length of SFT, 0 when it was left out. `voice` is the score of the best
    adapters' answers, `adapters` the SHA-256 of their tensors. `stopped` says why training stopped
    before its end.
    """

    updates: Count
    sft_updates: Count
    kept_update: Count
    voice: Share
    stopped: list[str]
    adapters: str


def write_outcome(run: RunFolder, outcome: Outcome) -> None:
    jsonl.write_json(run.outcome, asdict(outcome))


def read_outcome(run: RunFolder) -> Outcome:
    """Raises UserError when stage 10 has not come to its end, or the file is damaged."""
    path = run.outcome
    if not path.exists():
        raise UserError(f"{path}: no such file; run 10_train_dpo.py first")
    outcome: Outcome = records.read(path, Outcome)
    if outcome.kept_update > outcome.updates:
        raise UserError(
            f"{path}: keeps update {outcome.kept_update} of {outcome.updates}; {records.RUN_AGAIN}"
        )
    return outcome


def require_adapters(run: RunFolder) -> Path:
    """The folder of the best adapters. Raises UserError unless it holds what this run trained."""
    folder = run.adapters
    if not (folder / ADAPTERS).is_file():
        raise UserError(f"{folder}: no adapters there; run 10_train_dpo.py first")
    remedy = f"move {folder} away and run 10_train_dpo.py again"
    for name in (ADAPTERS, ADAPTER_CONFIG):
        ownership.require(folder / name, remedy)
    if digest.of_file(folder / ADAPTERS) != read_outcome(run).adapters:
        raise UserError(f"{folder}: these are not the adapters that this run trained; {remedy}")
    return folder


class MetricsRow(TypedDict):
    """A row of metrics.jsonl: the update that it is about. Everything else is optional, and a
    number except for TEXT_METRICS.
    """

    iteration: Count


TEXT_METRICS = {"phase": str, "skipped_lines": list[Count]}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Raises UserError as `records.read_rows` does."""
    rows = records.read_rows(path, MetricsRow)
    for number, row in enumerate(rows, start=1):
        try:
            for name, value in row.items():
                schema.parse(value, TEXT_METRICS.get(name, float), name)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; {records.RUN_AGAIN}") from error
    return rows


class FuseReport(TypedDict):
    """Stage 11. `margin_...` and `max_logprob_difference` are in nats; `margin_kept` is a share,
    None when the adapters have no margin. `by_rounding` holds the same for each rounding.
    """

    pairs: Count
    dtype: str
    rounding: str
    quantize: int | None
    margin_adapters: Finite
    margin_fused: Finite
    margin_kept: Finite | None
    max_logprob_difference: Finite
    by_rounding: dict[str, dict[str, Any]]


def read_fuse_report(run: RunFolder) -> FuseReport:
    """Raises UserError when it is missing or damaged."""
    return records.read(run.fuse_report, FuseReport)
