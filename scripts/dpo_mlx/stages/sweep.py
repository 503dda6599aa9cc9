"""Stage 14: train every combination of some settings, and compare the runs in one table.

The runs share the pairs. A run copies from an earlier one what would come out the same: the
reference, and SFT if its fingerprint is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import shlex
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote

from .. import config as configs
from ..config import Config
from ..files import fingerprint, jsonl, lock, ownership, records, results
from ..files.errors import UserError
from ..files.fingerprint import SFT_ADAPTERS
from ..files.run_folder import AFTER_SFT, BASE, RunFolder
from ..files.schema import Finite
from ..files.text import shown
from ..report import templates
from ..report.charts import FRAME, chart
from ..scoring.objectives import SFT
from ..training import checkpoint
from ..training.checkpoint import Checkpoints
from ..training.preflight import Refused
from .make_pairs import make_pairs
from .train_dpo import train_dpo

# The sections that only training reads. Runs with different pairs could not be compared.
VARIED = ("lora", "sft", "dpo", "train", "guard")

# The most runs of a sweep: each takes minutes at least.
MAX_RUNS = 100
# Characters in the name of a run's folder, and of the digest in a name that would be longer.
LONGEST_NAME, DIGEST = 120, 12

RESULTS, PAGE, TEMPLATE = "sweep.json", "sweep.html", "sweep.html.j2"

# The metrics of an evaluation in the table: (column, metric, number format).
COLUMNS = (
    ("voice", "eval_text/voice", ".2f"),
    ("habits", "eval_text/habits", ".2f"),
    ("distinct word pairs", "eval_text/distinct2", ".3f"),
    ("ended", "eval_text/self_ended", ".2f"),
    ("sense", "eval_text/sense", ".2f"),
    ("divergence", "eval_text/divergence", ".2f"),
    ("tokens", "eval_text/median_tokens", ".0f"),
    ("margin", "eval_rewards/margins", ".2f"),
)

Row = dict[str, Any]


class EarlierRow(TypedDict):
    """The part of an earlier sweep's row that a new sweep reads."""

    name: str
    minutes: Finite | None


class Results(TypedDict):
    """The contents of sweep.json."""

    runs: list[EarlierRow]


@dataclass(frozen=True)
class Combination:
    """One value for each varied setting, as `key=value`, and the config of that run."""

    settings: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return " ".join(self.settings)


def combinations(path: Path, overrides: list[str], grid: list[str]) -> list[Combination]:
    """Every combination of the values in `grid`, whose lines are `section.key=value,value`.

    Raises UserError for a key that a sweep does not vary, for values that the config refuses, for
    two values that mean the same, and for more than MAX_RUNS combinations.
    """
    folder = configs.load(path, overrides).run.sweep
    choices = [_choices(line) for line in grid]
    keys = [line.partition("=")[0].strip() for line in grid]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise UserError(
            f"--grid: {shown(repeated[0])} is given twice; write all of its values in one --grid"
        )
    if (count := math.prod(map(len, choices))) > MAX_RUNS:
        raise UserError(
            f"--grid: {count} combinations, but at most {MAX_RUNS} are allowed; give fewer values"
        )
    runs: list[Combination] = []
    for settings in itertools.product(*choices):
        run_dir = f"run_dir={folder / _folder_name(settings)}"
        config = configs.load(path, [*overrides, *settings, run_dir])
        runs.append(Combination(settings, config))
    _refuse_same_runs(runs)
    return runs


def _folder_name(settings: tuple[str, ...]) -> str:
    """The name of the folder for these settings.

    Escapes every character but letters, digits and `_.-~=+`, so that the name cannot lead to
    another folder. A long name is cut and gets a digest. So does a name with capitals, which a Mac
    does not tell from small letters.
    """
    text = "_".join(settings)
    name = quote(text, safe="=+")
    if len(name) <= LONGEST_NAME and name == quote(text.lower(), safe="=+"):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST]
    return f"{name[: LONGEST_NAME - DIGEST - 1]}_{digest}"


def _refuse_same_runs(runs: list[Combination]) -> None:
    """Raises UserError for two combinations that mean the same settings."""
    by_digest: dict[str, Combination] = {}
    for run in runs:
        other = by_digest.setdefault(configs.digest(replace(run.config, run_dir="")), run)
        if other is not run:
            raise UserError(
                f"--grid: {shown(other.name)} and {shown(run.name)} are the same settings; remove "
                "one of the two"
            )


def _choices(line: str) -> list[str]:
    key, _, values = line.partition("=")
    if key.partition(".")[0] not in VARIED or not values or not line.isprintable():
        raise UserError(
            f"--grid {shown(line)}: write section.key=value,value with a key of the sections "
            f"{', '.join(VARIED)}; other keys change the pairs or have no effect on training"
        )
    return [f"{key}={value}" for value in values.split(",")]


def sweep(base: Config, runs: list[Combination]) -> list[Row]:
    """Run all combinations. Writes the table after each run. Returns its rows, the best first."""
    make_pairs(base)
    folder = base.run.sweep
    for name in (RESULTS, PAGE):
        ownership.require(folder / name)
    earlier = {row["name"]: row["minutes"] for row in _read(folder)}
    rows: list[Row] = []
    for number, run in enumerate(runs, start=1):
        print(f"14: run {number} of {len(runs)}: {run.name}")
        others = [base.run, *(other.config.run for other in runs[: number - 1])]
        minutes, refused = _run(run.config, others)
        if refused is None and minutes is None:
            minutes = earlier.get(run.name)
        rows.append(_row(run, minutes, refused))
        rows.sort(key=_rank)
        _write(folder, base, rows)
    _print(rows, folder)
    return rows


def _read(folder: Path) -> list[EarlierRow]:
    path = folder / RESULTS
    results = records.read_if_exists(path, Results)
    return results["runs"] if results else []


def _run(config: Config, others: list[RunFolder]) -> tuple[float | None, str | None]:
    """Train one run. Returns (minutes, reason).

    `minutes` is None for a run that an earlier sweep trained. `reason` says why the preflight
    refused the settings, None if it did not.
    """
    with lock.hold_run(config.run):
        finished = config.run.outcome.is_file()
        if not finished:
            copy_common_parts(config, others)
        started = time.perf_counter()
        try:
            train_dpo(config)
        except Refused as refused:
            return None, str(refused)
        return None if finished else (time.perf_counter() - started) / 60, None


def copy_common_parts(config: Config, others: list[RunFolder]) -> None:
    """Copy SFT with both references from another run, or at least the base model's reference.

    A reference is stored with its fingerprint, so training notices one that does not fit.
    """
    if Checkpoints(config.run.checkpoints).newest(SFT) is not None:
        return
    for other in others:
        if (end := _end_of_sft(config, other)) is not None:
            print(f"14: SFT would be the same as in {other.path}; copied from there")
            for model in (BASE, AFTER_SFT):
                _copy(other.reference(model), config.run.reference(model))
            jsonl.write_text(config.run.metrics, other.metrics.read_text("utf-8"))
            best = checkpoint.read(end)[0].best
            paths = {end} if best is None else {end, Checkpoints(end.parent).best(best.update)}
            for path in sorted(paths):
                _copy(path, config.run.checkpoints / path.name)
            return
    for other in others:
        if other.reference(BASE).is_dir():
            _copy(other.reference(BASE), config.run.reference(BASE))
            return


def _end_of_sft(config: Config, other: RunFolder) -> Path | None:
    """The checkpoint at the end of another run's SFT, if this run's SFT would be the same."""
    end = Checkpoints(other.checkpoints).newest(SFT) if config.sft.epochs else None
    if end is None or not other.reference(AFTER_SFT).is_dir():
        return None
    expected = fingerprint.of(SFT_ADAPTERS, config.flat)
    stored = checkpoint.read(end)[1]
    return None if fingerprint.differences(stored.adapters, expected) else end


def _copy(source: Path, folder: Path) -> None:
    """Copy a folder, unless `folder` exists already or somebody changed `source`."""
    if folder.exists() or not ownership.is_untouched(source):
        return
    with ownership.new_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def _row(run: Combination, minutes: float | None, refused: str | None) -> Row:
    """The row of a run: how it ended, and the evaluation of the update that it kept."""
    row = {
        "name": run.name,
        "settings": run.settings,
        "run_dir": run.config.run_dir,
        "minutes": minutes,
        "refused": refused,
    }
    if refused is not None:
        return {**row, "stopped": [], "kept_update": None, "updates": 0, "evaluation": {}}
    end = results.read_outcome(run.config.run)
    *_, metrics = (
        metrics
        for metrics in results.read_metrics(run.config.run.metrics)
        if metrics["iteration"] == end.kept_update and "eval_loss" in metrics
    )
    evaluation = {metric: metrics.get(metric) for _, metric, _ in COLUMNS}
    return {
        **row,
        "stopped": end.stopped,
        "kept_update": end.kept_update,
        "updates": end.updates,
        "evaluation": evaluation,
    }


def _rank(row: Row) -> tuple[bool, float]:
    """The sort key: runs that reached their end come first, then the nearest to the voice."""
    voice = row["evaluation"].get("eval_text/voice", -math.inf)
    return not _reached_end(row), -min(voice, 1.0)


def _reached_end(row: Row) -> bool:
    return not (row["refused"] or row["stopped"])


def winner(rows: list[Row]) -> Row | None:
    """The best run. None when no run reached its end."""
    return rows[0] if _reached_end(rows[0]) else None


def command(row: Row, config: Path, overrides: list[str]) -> str:
    """The command that makes the finished model of a run."""
    sets = [*overrides, *row["settings"], f"run_dir={row['run_dir']}"]
    options = [word for setting in sets for word in ("--set", setting)]
    return shlex.join(["./train_dpo_run1.sh", str(config), *options])


def cells(row: Row) -> list[str]:
    """A row of the table, as text."""
    numbers = [templates.number(row["evaluation"].get(metric), spec) for _, metric, spec in COLUMNS]
    update = row["kept_update"]
    kept = "–" if update is None else f"{update} of {row['updates']}"
    ending = "refused" if row["refused"] else "stopped" if row["stopped"] else ""
    return [row["name"], *numbers, kept, templates.number(row["minutes"], ".1f"), ending]


HEAD = ["settings", *(name for name, *_ in COLUMNS), "kept update", "minutes", ""]


def _write(folder: Path, base: Config, rows: list[Row]) -> None:
    jsonl.write_json(folder / RESULTS, {"runs": rows})
    with_charts = []
    for row in rows:
        if (update := row["kept_update"]) is not None:
            metrics = results.read_metrics(RunFolder(Path(row["run_dir"])).metrics)
            charts = {name: chart(metrics, name, update) for name in ("voice", "fluency")}
            with_charts.append({**row, "charts": charts})
    page = templates.render(
        TEMPLATE, base=base, head=HEAD, rows=rows, cells=cells, drawn=with_charts, frame=FRAME
    )
    jsonl.write_text(folder / PAGE, page)


def _print(rows: list[Row], folder: Path) -> None:
    table = [HEAD, *map(cells, rows)]
    first_width, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    for name, *values in table:
        aligned = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        print("  ".join([name.ljust(first_width), *aligned]).rstrip())
    for row in rows:
        for reason in [*row["stopped"], *filter(None, [row["refused"]])]:
            print(f"14: {row['name']}: {reason}")
    print(f"14: the same table, with curves:\n{folder / PAGE}")
