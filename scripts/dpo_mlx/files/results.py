"""The files that a stage writes for later stages: the pairs' report, the outcome and the metrics of
training, and the fuse report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from . import digest, jsonl, ownership, records, schema
from .errors import UserError
from .model_files import ADAPTER_CONFIG, ADAPTERS
from .run_folder import PairFiles, RunFolder
from .schema import Count, Finite

# The percentiles of answer lengths in the pairs' report.
PERCENTILES = (5, 25, 50, 75, 95, 100)
LENGTHS: tuple[Literal["percentiles", "chosen", "rejected"], ...] = (
    "percentiles",
    "chosen",
    "rejected",
)


class Lengths(TypedDict):
    """Percentiles of the answer lengths in tokens."""

    percentiles: list[Count]
    chosen: list[Count]
    rejected: list[Count]


class PairsReport(TypedDict):
    """Stage 06: number of pairs, dropped rows by reason, answer lengths, the fingerprint."""

    train: Count
    valid: Count
    dropped: dict[str, Count]
    rejected_finish: dict[str, Count]
    tokens: Lengths
    inputs: dict[str, Any]


def read_pairs_report(files: PairFiles) -> PairsReport | None:
    """Read the pairs' report. None when stage 06 has not finished, or did not run."""
    report: PairsReport | None = records.read_if_exists(files.report, PairsReport)
    if report and any(len(report["tokens"][part]) != len(PERCENTILES) for part in LENGTHS):
        raise UserError(
            f'{files.report}: "tokens" has lists of different lengths; {records.RUN_AGAIN}'
        )
    return report


@dataclass(frozen=True)
class Measures:
    """What an evaluation measures of a model's answers to the held-out questions.

    `voice` is each answer's place on the voice scale, `means` the mean of each measure by name.
    """

    voice: list[float]
    means: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The measures of the model after an update."""

    update: Count
    measures: Measures

    @property
    def voice(self) -> float:
        """The mean place of the answers on the voice scale."""
        return self.measures.means["voice"]


@dataclass(frozen=True)
class Outcome:
    """How training ended, after `updates` of both phases.

    `sft_updates` is the length of SFT, 0 when it was left out, and `end_of_sft` its evaluation.
    `last` is the last evaluation of the run, `kept` that of the best adapters, `adapters` the
    SHA-256 of their tensors. `stopped` says why training stopped before its end, `notes` what the
    preflight found wrong.
    """

    updates: Count
    sft_updates: Count
    end_of_sft: Evaluation | None
    last: Evaluation
    kept: Evaluation
    stopped: list[str]
    notes: list[str]
    adapters: str

    @property
    def kept_update(self) -> int:
        return self.kept.update

    @property
    def of_dpo(self) -> Evaluation | None:
        """The kept evaluation if it is DPO's, otherwise DPO's last. None if DPO has none."""
        of_dpo = [e for e in (self.kept, self.last) if e.update > self.sft_updates]
        return of_dpo[0] if of_dpo else None


def write_outcome(run: RunFolder, outcome: Outcome) -> None:
    jsonl.write_json(run.outcome, asdict(outcome))


def read_outcome(run: RunFolder) -> Outcome:
    """Read the outcome. Raises UserError when stage 10 has not finished, or the file is damaged."""
    path = run.outcome
    if not path.exists():
        raise UserError(f"{path}: no such file; run 10_train_dpo.py first")
    outcome: Outcome = records.read(path, Outcome)
    if outcome.kept_update > outcome.updates:
        raise UserError(
            f"{path}: kept.update {outcome.kept_update} is above updates {outcome.updates}; "
            f"{records.RUN_AGAIN}"
        )
    return outcome


def require_adapters(run: RunFolder) -> Path:
    """Returns the folder of the best adapters. Raises UserError unless this run trained them."""
    folder = run.adapters
    if not (folder / ADAPTERS).is_file():
        raise UserError(f"{folder}: has no adapters; run 10_train_dpo.py first")
    remedy = f"move {folder} away and run 10_train_dpo.py again"
    for name in (ADAPTERS, ADAPTER_CONFIG):
        ownership.require(folder / name, remedy)
    if digest.of_file(folder / ADAPTERS) != read_outcome(run).adapters:
        raise UserError(f"{folder}: these are not the adapters that this run trained; {remedy}")
    return folder


class MetricsRow(TypedDict):
    """A row of metrics.jsonl: the number of its update. All other keys are optional, and numbers
    except for the keys in TEXT_METRICS.
    """

    iteration: Count


TEXT_METRICS = {"phase": str, "skipped_lines": list[Count]}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl. Raises UserError like `records.read_rows`."""
    rows = records.read_rows(path, MetricsRow)
    for number, row in enumerate(rows, start=1):
        try:
            for name, value in row.items():
                schema.parse(value, TEXT_METRICS.get(name, float), name)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}; {records.RUN_AGAIN}") from error
    return rows


class FuseReport(TypedDict):
    """Stage 11. `margin_...` and `max_logprob_difference` are in nats. `margin_kept` is a share, or
    None when the adapters have no margin. `by_rounding` has the same figures for each rounding.
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
    """Read the fuse report. Raises UserError when it is missing or damaged."""
    return records.read(run.fuse_report, FuseReport)
