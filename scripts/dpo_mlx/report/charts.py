"""Turns a run's metrics into chart geometry, which a template draws as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..scoring.objectives import SFT
from .templates import number

Row = Mapping[str, Any]
Point = tuple[float, float]

# The size of a chart and the edges of its plot, in SVG units. One unit is one CSS pixel on a phone
# and about one on a desktop, so the text keeps its size.
FRAME = {"width": 360, "height": 242, "left": 54, "right": 348, "top": 34, "bottom": 204}


# For each chart, its curves: metric, label in the legend, CSS classes ("valid" draws points).
CURVES = {
    "voice": (("eval_text/voice", "held-out questions", "tuned valid"),),
    "fluency": (
        ("eval_text/distinct2", "distinct word pairs", "tuned valid"),
        ("eval_text/self_ended", "ended by itself", "ended valid"),
    ),
    "loss": (("loss", "train", "tuned"), ("eval_loss", "held-out", "tuned valid")),
    "margin": (
        ("rewards/margins", "train", "tuned"),
        ("eval_rewards/margins", "held-out", "tuned valid"),
    ),
    "per_token": (
        ("logps/chosen_per_token", "yours, train", "chosen"),
        ("eval_logps/chosen_per_token", "yours, held-out", "chosen valid"),
        ("logps/rejected_per_token", "rejected, train", "base"),
        ("eval_logps/rejected_per_token", "rejected, held-out", "base valid"),
    ),
}

# These charts span at least 0 to 1, so that a small change looks small.
SHARES = {"voice", "fluency"}
# These metrics are relative to the start of a phase, so SFT's values do not continue in DPO.
ONLY_DPO = {"loss", "margin"}


@dataclass(frozen=True)
class Scale:
    """A linear map from [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Tick:
    """A label of an axis and its position, in SVG units."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A metric over updates: an SVG path and the points on it, in SVG units."""

    label: str
    css: str
    path: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw a chart.

    `dpo_x` and `kept_x` are the x of the two vertical lines, None for no line. `skipped` counts the
    values left out because they are NaN or infinite.
    """

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    dpo_x: float | None
    kept_x: float | None
    skipped: int


def chart(rows: Sequence[Row], name: str, kept_update: int | None) -> Chart:
    """The curves of CURVES[name], and a vertical line at `kept_update`.

    The x axis always covers the whole run. A metric without values gives a curve without points.
    """
    chart_rows = of_dpo(rows) if name in ONLY_DPO else rows
    points_by_key = {key: series(chart_rows, key) for key, _, _ in CURVES[name]}
    values = [value for points in points_by_key.values() for _, value in points]
    x = Scale(0, max(1, last_update(rows)), FRAME["left"], FRAME["right"])
    low, high = (min([0, *values]), max([1, *values])) if name in SHARES else padded(values)
    # SVG counts y downwards, so the lowest value is at the bottom.
    y = Scale(low, high, FRAME["bottom"], FRAME["top"])
    curves = []
    for key, label, css in CURVES[name]:
        points = [(x(update), y(value)) for update, value in points_by_key[key]]
        curves.append(Curve(label, css, path(points), points))
    values_in_rows = sum(key in row for row in chart_rows for key in points_by_key)
    end_of_sft = last_sft_update(rows)
    return Chart(
        x_ticks=ticks(x, least_step=1),
        y_ticks=ticks(y),
        curves=curves,
        dpo_x=None if end_of_sft is None else x(end_of_sft),
        kept_x=None if kept_update is None else x(kept_update),
        skipped=values_in_rows - len(values),
    )


def of_sft(rows: Iterable[Row]) -> list[Row]:
    """The rows of the SFT phase."""
    return [row for row in rows if row.get("phase") == SFT]


def of_dpo(rows: Iterable[Row]) -> list[Row]:
    """The rows of the DPO phase. A row without a phase comes from a run of DPO alone."""
    return [row for row in rows if row.get("phase") != SFT]


def last_update(rows: Iterable[Row]) -> int:
    """The last update in the rows; 0 without rows."""
    return max((row["iteration"] for row in rows), default=0)


def last_sft_update(rows: Sequence[Row]) -> int | None:
    """The last update of SFT; None when the run had no SFT or never reached DPO."""
    sft = of_sft(rows)
    return last_update(sft) if sft and of_dpo(rows) else None


def series(rows: Iterable[Row], key: str) -> list[Point]:
    """(update, value) for each row with a finite value of this metric."""
    return [(row["iteration"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of an axis: the range of the values, widened by 6% at each end.

    It spans at least 2% of the largest value, so that a curve that hardly moves looks flat.
    Without values it is a small range around 0.
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = max(0.06 * (high - low), 0.01 * max(abs(low), abs(high))) or 0.1
    return low - room, high + room


def path(points: Sequence[Point]) -> str:
    """SVG path data through these points. With round line ends, a single point becomes a dot."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "h0" if points else ""


def nice_ticks(low: float, high: float, count: int = 5, least_step: float = 0.0) -> list[float]:
    """At most count + 1 round numbers in [low, high]: multiples of a `nice_step`."""
    step = nice_step((high - low) / count, least_step)
    slack = 1e-9  # in floats 0.6 / 0.2 is less than 3
    first, last = math.ceil(low / step - slack), math.floor(high / step + slack)
    return [i * step for i in range(first, last + 1)]


def nice_step(raw: float, least: float = 0.0) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least `raw` and `least`."""
    raw = max(raw, least)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def ticks(scale: Scale, least_step: float = 0.0) -> list[Tick]:
    """The ticks of a scale. Labels have the decimals that the step needs."""
    values = nice_ticks(scale.low, scale.high, least_step=least_step)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    spec = (
        f".{decimals}f" if decimals <= 4 else ".3g"
    )  # 2e-05 fits beside the axis, 0.00002 does not
    return [Tick(scale(value), number(value, spec)) for value in values]
