"""The model card: data, training settings, measurements, and commands to run the model."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from ..config import Config, Scalar
from ..files import jsonl, schema
from ..files.model_files import CARD
from ..files.results import Outcome, read_pairs_report
from ..training.outcome import comparison, place
from . import templates

TEMPLATE = "card.md.j2"


def write(config: Config, folder: Path, report: Mapping[str, Any]) -> None:
    """Write the card into a model folder.

    `report` holds `training` (an Outcome), `fuse` (stage 11's measurements), and
    after stage 12 also `verdict`, `fluency` and `cost`.
    """
    jsonl.write_text(folder / CARD, render(config, report))


def render(config: Config, report: Mapping[str, Any]) -> str:
    """The text of the card. For `report` see `write`."""
    outcome: Outcome = schema.parse(report["training"], Outcome)
    return templates.render(
        TEMPLATE,
        config=config,
        template_args=_template_args(config.chat_template_args),
        name=config.run.path.name,
        base=Path(config.model).name if os.path.isdir(config.model) else config.model,
        counts=read_pairs_report(config.pairs),
        training=outcome,
        kept_place=place(outcome),
        comparison=comparison(outcome),
        fuse=report["fuse"],
        verdict=report.get("verdict"),
        fluency=report.get("fluency"),
        cost=report.get("cost"),
    )


def _template_args(arguments: Mapping[str, Scalar]) -> dict[str, str] | None:
    """The chat template's arguments as one shell word and as Python keywords; None if empty."""
    if not arguments:
        return None
    all_identifiers = all(name.isidentifier() and not iskeyword(name) for name in arguments)
    keywords = ", ".join(f"{name}={value!a}" for name, value in arguments.items())
    return {
        "shell": shlex.quote(json.dumps(arguments)),
        "python": keywords if all_identifiers else f"**{ascii(dict(arguments))}",
    }
