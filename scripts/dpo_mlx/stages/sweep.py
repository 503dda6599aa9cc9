"""Stage 14: every combination of some settings as a run of its own, compared in one table.

The runs share the pairs. What a run has in common with one that came before, by the fingerprints of
what it was made of, is copied from there: the reference, and SFT with its end.
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

# Sections that training alone reads; another pairs file would be another comparison.
VARIED = ("lora", "sft", "dpo", "train", "guard")

# Runs of a sweep; each takes minutes at least. Characters of the name of a run's folder.
MOST_RUNS, LONGEST_NAME, DIGEST = 100, 120, 12

RESULTS, PAGE, TEMPLATE = "sweep.json", "sweep.html", "sweep.html.j2"

# Of an evaluation, what the table shows: its column, the metric, how it is written.
COLUMNS = (
    ("voice", "eval_text/voice", ".2f"),
    ("distinct pairs", "eval_text/distinct2", ".3f"),
    ("ended", "eval_text/self_ended", ".2f"),
    ("base log-prob", "eval_text/base_logprob_per_token", ".2f"),
    ("tokens", "eval_text/median_tokens", ".0f"),
    ("margin", "eval_rewards/margins", ".2f"),
)

Row = dict[str, Any]


class Known(TypedDict):
    """What an earlier sweep's row is still asked for."""

    name: str
    minutes: Finite | None


class Results(TypedDict):
    """What sweep.json holds."""

    runs: list[Known]


@dataclass(frozen=True)
class Combination:
    """One choice of every varied setting, each `key=value`, and the run it makes."""

    settings: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return " ".join(self.settings)


def combinations(path: Path, overrides: list[str], grid: list[str]) -> list[Combination]:
    """Every combination of the grid's values, each line of which is `section.key=value,value`.

    Raises UserError for a key that a sweep does not vary, for what no run would take, for two
    values that mean the same, and for more than MOST_RUNS combinations.
    """
    folder = configs.load(path, overrides).run.sweep
    choices = [_choices(line) for line in grid]
    keys = [line.partition("=")[0].strip() for line in grid]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--grid: {shown(repeated[0])} is given twice")
    if (runs := math.prod(map(len, choices))) > MOST_RUNS:
        raise UserError(
            f"--grid: {runs} combinations, and the most is {MOST_RUNS}; give fewer values"
        )
    made: list[Combination] = []
    for settings in itertools.product(*choices):
        run = f"run_dir={folder / _folder_name(settings)}"
        config = configs.load(path, [*overrides, *settings, run])
        made.append(Combination(settings, config))
    _refuse_same_runs(made)
    return made


def _folder_name(settings: tuple[str, ...]) -> str:
    """One name for these settings, which leads nowhere else: what is not a letter, digit, or one of
    `_.-~=+` is escaped. Of a long name, and of one with capitals, which to a Mac are small letters,
    a digest is a part.
    """
    text = "_".join(settings)
    name = quote(text, safe="=+")
    if len(name) <= LONGEST_NAME and name == quote(text.lower(), safe="=+"):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST]
    return f"{name[: LONGEST_NAME - DIGEST - 1]}_{digest}"


def _refuse_same_runs(runs: list[Combination]) -> None:
    first: dict[str, Combination] = {}
    for run in runs:
        other = first.setdefault(configs.digest(replace(run.config, run_dir="")), run)
        if other is not run:
            raise UserError(
                f"--grid: {shown(other.name)} and {shown(run.name)} are the same settings; remove "
                "one of the two"
            )


def _choices(line: str) -> list[str]:
    key, _, values = line.partition("=")
    if key.partition(".")[0] not in VARIED or not values or not line.isprintable():
        raise UserError(
            f"--grid {shown(line)}: write section.key=value,value with a key of "
            f"{', '.join(VARIED)}; other keys change the pairs, or nothing that is compared"
        )
    return [f"{key}={value}" for value in values.split(",")]


def sweep(base: Config, runs: list[Combination]) -> list[Row]:
    """Run all, print and write the table after each; the rows, best first."""
    make_pairs(base)
    folder = base.run.sweep
    for name in (RESULTS, PAGE):
        ownership.require(folder / name)
    before = {row["name"]: row for row in _read(folder)}
    rows: list[Row] = []
    for number, run in enumerate(runs, start=1):
        print(f"14: run {number} of {len(runs)}: {run.name}")
        done = [base.run, *(other.config.run for other in runs[: number - 1])]
        minutes, refused = _run(run.config, done)
        if refused is None and minutes is None:
            minutes = before[run.name]["minutes"] if run.name in before else None
        rows.append(_row(run, minutes, refused))
        rows.sort(key=_rank)
        _write(folder, base, rows)
    _print(rows, folder)
    return rows


def _read(folder: Path) -> list[Known]:
    path = folder / RESULTS
    results = records.read_if_exists(path, Results)
    return results["runs"] if results else []


def _run(config: Config, done: list[RunFolder]) -> tuple[float | None, str | None]:
    """(minutes, None when the run was there already; why the preflight refused it)."""
    with lock.hold_run(config.run):
        finished = config.run.outcome.is_file()
        if not finished:
            _take_over(config, done)
        started = time.perf_counter()
        try:
            train_dpo(config)
        except Refused as refused:
            return None, str(refused)
        return None if finished else (time.perf_counter() - started) / 60, None


def _take_over(config: Config, done: list[RunFolder]) -> None:
    """Copy what other runs have made of the same: the end of SFT with all that led there, or the
    base model's reference. References say themselves what they are of.
    """
    if Checkpoints(config.run.checkpoints).newest(SFT) is not None:
        return
    for other in done:
        if (end := _end_of_sft(config, other)) is not None:
            print(f"14: SFT is copied from {other.path}")
            for model in (BASE, AFTER_SFT):
                _copy(other.reference(model), config.run.reference(model))
            jsonl.write_text(config.run.metrics, other.metrics.read_text("utf-8"))
            best = checkpoint.read(end)[0].best
            paths = {end} if best is None else {end, Checkpoints(end.parent).best(best.update)}
            for path in sorted(paths):
                _copy(path, config.run.checkpoints / path.name)
            return
    for other in done:
        if other.reference(BASE).is_dir():
            _copy(other.reference(BASE), config.run.reference(BASE))
            return


def _end_of_sft(config: Config, other: RunFolder) -> Path | None:
    """That of another run, if it was made of what this run's would be made of."""
    end = Checkpoints(other.checkpoints).newest(SFT) if config.sft.epochs else None
    if end is None or not other.reference(AFTER_SFT).is_dir():
        return None
    wanted = fingerprint.of(SFT_ADAPTERS, config)
    origin = checkpoint.read(end)[1]
    return None if fingerprint.differences(origin.adapters, wanted) else end


def _copy(source: Path, folder: Path) -> None:
    """Unless the run has made that itself, or somebody put something into the other's."""
    if folder.exists() or not ownership.is_untouched(source):
        return
    with ownership.new_folder(folder) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def _row(run: Combination, minutes: float | None, refused: str | None) -> Row:
    """What is known of a run at the update that it keeps."""
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
    *_, kept = (
        found
        for found in results.read_metrics(run.config.run.metrics)
        if found["iteration"] == end.kept_update and "eval_loss" in found
    )
    evaluation = {metric: kept.get(metric) for _, metric, _ in COLUMNS}
    return {
        **row,
        "stopped": end.stopped,
        "kept_update": end.kept_update,
        "updates": end.updates,
        "evaluation": evaluation,
    }


def _rank(row: Row) -> tuple[bool, float]:
    """Runs that came to their end first, most in the voice first."""
    voice = row["evaluation"].get("eval_text/voice", -math.inf)
    return not _is_whole(row), -voice


def _is_whole(row: Row) -> bool:
    return not (row["refused"] or row["stopped"])


def winner(rows: list[Row]) -> Row | None:
    """The best run, None when none came to its end."""
    return rows[0] if _is_whole(rows[0]) else None


def command(row: Row, config: Path, overrides: list[str]) -> str:
    """What makes the finished model of a run, all in one line."""
    sets = [*overrides, *row["settings"], f"run_dir={row['run_dir']}"]
    options = [word for setting in sets for word in ("--set", setting)]
    return shlex.join(["./train_dpo_run1.sh", str(config), *options])


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    numbers = [templates.number(row["evaluation"].get(metric), spec) for _, metric, spec in COLUMNS]
    kept = "–" if row["kept_update"] is None else f"{row['kept_update']} of {row['updates']}"
    how = "refused" if row["refused"] else "stopped" if row["stopped"] else ""
    return [row["name"], *numbers, kept, templates.number(row["minutes"], ".1f"), how]


HEAD = ["settings", *(name for name, *_ in COLUMNS), "kept update", "minutes", ""]


def _write(folder: Path, base: Config, rows: list[Row]) -> None:
    jsonl.write_json(folder / RESULTS, {"runs": rows})
    drawn = []
    for row in rows:
        if row["kept_update"] is not None:
            read = results.read_metrics(RunFolder(Path(row["run_dir"])).metrics)
            charts = {name: chart(read, name, row["kept_update"]) for name in ("voice", "fluency")}
            drawn.append({**row, "charts": charts})
    page = templates.render(
        TEMPLATE, base=base, head=HEAD, rows=rows, cells=cells, drawn=drawn, frame=FRAME
    )
    jsonl.write_text(folder / PAGE, page)


def _print(rows: list[Row], folder: Path) -> None:
    table = [HEAD, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([line[0].ljust(len(first)), *rest]).rstrip())
    for row in rows:
        for reason in [*row["stopped"], *filter(None, [row["refused"]])]:
            print(f"14: {row['name']}: {reason}")
    print(f"14: the table with curves:\n{folder / PAGE}")
