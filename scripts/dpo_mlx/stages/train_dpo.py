"""Stage 10: pairs in, adapters out."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from ..files import atomic, fingerprint, ownership, results
from ..files.errors import UserError
from ..files.fingerprint import TRAINING, Fingerprint
from ..files.results import Outcome
from ..training import checkpoint
from ..training.outcome import describe
from ..training.phases import Phases
from ..training.preflight import preflight
from ..training.setup import Setup, prepare
from ..training.trainer import Stopped

# The parts of stage 10 that can be run alone.
ONLY_REFERENCE, ONLY_DPO = "reference", "dpo"


def train_dpo(config: Config, only: str | None = None) -> bool:
    """Run stage 10, or only one part of it. Returns whether training reached its end.

    Raises UserError for pairs, a model or settings that cannot be trained, and for ONLY_DPO
    without a reference.
    """
    run, current = config.run, fingerprint.of(TRAINING, config.flat)
    stamp, outputs = run.stamp(TRAINING), [run.adapters, run.outcome, run.metrics]
    if only != ONLY_REFERENCE and fingerprint.is_current(stamp, current, outputs):
        print(f"10: {run.adapters} is up to date, skipped")
        return _print(results.read_outcome(run))
    ownership.require_untouched(run.adapters)
    setup = prepare(config, current)
    _require_space(setup)
    phases = Phases(setup)
    findings = preflight(setup, only_read=only == ONLY_DPO)
    outcome = _train(phases, only, [*setup.notes, *(finding.text for finding in findings)])
    if outcome is None:
        return True
    results.write_outcome(run, outcome)
    fingerprint.write(stamp, setup.fingerprint)
    _refuse_changes(setup.fingerprint, fingerprint.of(TRAINING, config.flat), run.adapters)
    print(f"10: the best adapters are in {run.adapters}")
    return _print(outcome)


def _train(phases: Phases, only: str | None, notes: list[str]) -> Outcome | None:
    """Run SFT and DPO. None for ONLY_REFERENCE, which stops before DPO."""
    only_read = only == ONLY_DPO
    stopped: list[str] = []
    try:
        if phases.sft_updates:
            phases.run_sft(only_read)
        references = phases.references(only_read)
        if only == ONLY_REFERENCE:
            phases.write_config()
            return None
        phases.run_dpo(references)
    except Stopped as stop:
        stopped = stop.reasons
    return phases.keep_best(stopped, notes)


def _require_space(setup: Setup) -> None:
    """Raises UserError when the disk has no room for the checkpoints."""
    size = checkpoint.MAX_CHECKPOINTS * checkpoint.size(setup.model) + atomic.SMALL_FILES
    atomic.require_space(setup.config.run.path, size, "run_dir")


def _refuse_changes(before: Fingerprint, after: Fingerprint, adapters: Path) -> None:
    """Raises UserError when the input files changed while training ran."""
    if changes := fingerprint.differences(before, after):
        raise UserError(
            f"{adapters}: the input files changed while training ran ({'; '.join(changes)}). These "
            "adapters were trained on the old ones; run 10_train_dpo.py again to train on the new "
            "ones"
        )


def _print(outcome: Outcome) -> bool:
    """Print how training ended. Returns whether it reached its end."""
    for line in describe(outcome):
        print(f"10: {line}")
    return not outcome.stopped
