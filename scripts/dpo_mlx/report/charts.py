"""Curves of a run's metrics as charts, in numbers that a template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .templates import number

Row = Mapping[str, Any]
Point = tuple[float, float]

# A chart in SVG units, which are CSS pixels on a phone and about that on a desktop, so that its
# text keeps its size. The plot lies between left and right, top and bottom.
FRAME = {"width": 360, "height": 242, "left": 54, "right": 348, "top": 34, "bottom": 204}

# The phase of a row of metrics.jsonl that comes before DPO, if any does.
SFT = "sft"

# Curves by chart: the metric, its name in the legend, its CSS classes ("valid" gets points).
CURVES = {
    "voice": (
        ("eval_text/voice", "sampled", "tuned valid"),
        ("eval_text/greedy_voice", "greedy", "tuned greedy valid"),
    ),
    "fluency": (
        ("eval_text/distinct2", "distinct pairs, sampled", "tuned valid"),
        ("eval_text/greedy_distinct2", "distinct pairs, greedy", "tuned greedy valid"),
        ("eval_text/self_ended", "ended by itself, sampled", "ended valid"),
    ),
    "loss": (("loss", "train", "tuned"), ("eval_loss", "valid", "tuned valid")),
    "margin": (
        ("rewards/margins", "train", "tuned"),
        ("eval_rewards/margins", "valid", "tuned valid"),
    ),
    "per_token": (
        ("logps/chosen_per_token", "chosen, train", "chosen"),
        ("eval_logps/chosen_per_token", "chosen, valid", "chosen valid"),
        ("logps/rejected_per_token", "rejected, train", "base"),
        ("eval_logps/rejected_per_token", "rejected, valid", "base valid"),
    ),
}

# Drawn from 0 to 1 whatever they hold, so that a small change looks small.
SHARES = {"voice", "fluency"}
# Measured against where a phase began: what they say of SFT would not go on in DPO.
ONLY_DPO = {"loss", "margin"}


@dataclass(frozen=True)
class Scale:
    """The linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Tick:
    """Where an axis is labelled, and with what."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A metric over updates: an SVG path, and the places it goes through."""

    label: str
    css: str
    path: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw curves; `skipped` values were no finite numbers.

    `dpo_begins` and `kept` are where the vertical lines are, None without one.
    """

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    dpo_begins: float | None
    kept: float | None
    skipped: int


def chart(rows: Sequence[Row], name: str, kept: int | None) -> Chart:
    """The curves of CURVES[name] and a line at the update `kept`; every chart has the x range of
    the whole run. Without curves when there is nothing to draw.
    """
    drawn = of_dpo(rows) if name in ONLY_DPO else rows
    found = {key: series(drawn, key) for key, _, _ in CURVES[name]}
    values = [value for points in found.values() for _, value in points]
    x = Scale(0, max(1, last_update(rows)), FRAME["left"], FRAME["right"])
    low, high = (0, 1) if name in SHARES else padded(values)
    # SVG counts downwards: the lowest value lies at the bottom.
    y = Scale(low, high, FRAME["bottom"], FRAME["top"])
    curves = []
    for key, label, css in CURVES[name]:
        places = [(x(update), y(value)) for update, value in found[key]]
        curves.append(Curve(label, css, path(places), places))
    written = sum(key in row for row in drawn for key in found)
    begins = dpo_begins(rows)
    return Chart(
        x_ticks=ticks(x, least_step=1),
        y_ticks=ticks(y),
        curves=curves,
        dpo_begins=None if begins is None else x(begins),
        kept=None if kept is None else x(kept),
        skipped=written - len(values),
    )


def of_sft(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("phase") == SFT]


def of_dpo(rows: Iterable[Row]) -> list[Row]:
    """The rows after SFT; those without a phase are of a run that had none but DPO."""
    return [row for row in rows if row.get("phase") != SFT]


def last_update(rows: Iterable[Row]) -> int:
    return max((row["iteration"] for row in rows), default=0)


def dpo_begins(rows: Sequence[Row]) -> int | None:
    """The last update of SFT, None when SFT was left out or DPO not reached."""
    sft = of_sft(rows)
    return last_update(sft) if sft and of_dpo(rows) else None


def series(rows: Iterable[Row], key: str) -> list[Point]:
    """(update, value) of the rows that have a finite value of this metric."""
    return [(row["iteration"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds the values with some room; about 0 when there are none.

    At least 2% of the values' size, so that a curve that hardly moves is drawn as one.
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high))) or 0.1
    return low - room, high + room


def path(places: Sequence[Point]) -> str:
    """SVG path data through these places; one place becomes a dot (with round line ends)."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places) + "h0" if places else ""


def nice_ticks(low: float, high: float, count: int = 5, least_step: float = 0.0) -> list[float]:
    """Multiples within [low, high] of 1, 2 or 5 times a power of ten; at most count + 1."""
    step = nice_step((high - low) / count, least_step)
    slack = 1e-9  # 0.6 / 0.2 is below 3
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    return [i * step for i in range(first, last + 1)]


def nice_step(raw: float, least: float = 0.0) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is not below `raw` nor `least`."""
    raw = max(raw, least)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def ticks(scale: Scale, least_step: float = 0.0) -> list[Tick]:
    """Ticks of a scale, labelled with as many decimals as tell them apart."""
    values = nice_ticks(scale.low, scale.high, least_step=least_step)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    spec = f".{decimals}f" if decimals <= 4 else ".3g"  # 0.00002 would not fit, 2e-05 does
    return [Tick(scale(value), number(value, spec)) for value in values]
