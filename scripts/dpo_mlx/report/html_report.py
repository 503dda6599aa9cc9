"""The report of a run as one HTML file: no network, no script, all outside text escaped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import jsonl, schema
from ..files.results import Outcome, read_metrics
from ..training.outcome import advice, comparison, place
from . import templates
from .charts import CURVES, FRAME, Row, Scale, chart, last_update, of_sft, series, ticks
from .sections import OTHER_SYSTEM_QUESTIONS
from .verdict import CROSSED

TEMPLATE = "report.html.j2"

# The means of an evaluation that show what DPO added: name, label, format.
EVALUATED = (
    ("voice", "Share of the way to your voice", ".0%"),
    ("habits", "Share of your habits that carried over", ".0%"),
    ("distinct2", "Distinct word pairs", ".2f"),
    ("self_ended", "Ended by itself", ".0%"),
    ("sense", "Fits its question, nats per token", ".2f"),
    ("divergence", "Distance from the base model, nats per token", ".2f"),
)


def write_html(path: Path, report: dict[str, Any], metrics_path: Path) -> None:
    """Write the page to `path` atomically."""
    jsonl.write_text(path, render(report, read_metrics(metrics_path)))


def render(report: Mapping[str, Any], metrics_rows: Sequence[Row]) -> str:
    """The page, from the content of report.json and the rows of metrics.jsonl."""
    training, pairs = report["training"], report["run"]["pairs"]
    outcome: Outcome | None = None if training is None else schema.parse(training, Outcome)
    kept_update = None if outcome is None else outcome.kept_update
    return templates.render(
        TEMPLATE,
        **report,
        kept_update=kept_update,
        evaluated=EVALUATED,
        crossed=CROSSED,
        other_questions=min(OTHER_SYSTEM_QUESTIONS, len(report["answers"])),
        shared_questions=shared_questions(report),
        dpo_update=None if outcome is None or outcome.of_dpo is None else outcome.of_dpo.update,
        kept_place=None if outcome is None else place(outcome),
        comparison=None if outcome is None else comparison(outcome),
        advice=None if outcome is None else advice(outcome),
        charts={name: chart(metrics_rows, name, kept_update) for name in CURVES},
        run_cost=run_cost(metrics_rows),
        frame=FRAME,
        lengths=None if pairs is None else lengths(pairs["tokens"]),
        settings=sections(report["run"]["config"]),
    )


def shared_questions(report: Mapping[str, Any]) -> int:
    """How many questions of the report were also asked in the evaluations of training.

    The report has the last held-out questions, the evaluations have the first. 0 if unknown.
    """
    pairs, train = report["run"]["pairs"], report["run"]["config"]["train"]
    if pairs is None or "eval_questions" not in train:
        return 0
    evaluated = min(train["eval_questions"], pairs["valid"])
    return max(0, len(report["answers"]) + evaluated - pairs["valid"])


def lengths(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The box plot of answer lengths in tokens.

    For chosen and for rejected answers: `values` is each percentile's length, `boxes` its x in SVG
    units.
    """
    sides = {
        side: dict(zip(tokens["percentiles"], tokens[side], strict=True))
        for side in ("chosen", "rejected")
    }
    longest = max([1, *(n for side in sides.values() for n in side.values())])
    scale = Scale(0, longest, 66, FRAME["right"])
    boxes = {side: {p: scale(n) for p, n in values.items()} for side, values in sides.items()}
    return {"values": sides, "boxes": boxes, "ticks": ticks(scale, least_step=1)}


def run_cost(rows: Sequence[Row]) -> dict[str, Any]:
    """The run's number of updates, of SFT updates, its peak memory and its median speed.

    Memory and speed are None when no row has them.
    """
    memory = [value for _, value in series(rows, "peak_memory_gb")]
    speed = [value for _, value in series(rows, "tokens_per_second")]
    return {
        "updates": last_update(rows),
        "sft_updates": last_update(of_sft(rows)),
        "peak_memory_gb": max(memory, default=None),
        "tokens_per_second": statistics.median(speed) if speed else None,
    }


def sections(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config as {section: {key: value}}. Keys outside any section come under "run"."""
    top = {key: value for key, value in config.items() if not isinstance(value, dict)}
    return {"run": top, **{key: value for key, value in config.items() if isinstance(value, dict)}}
