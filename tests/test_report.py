"""The report page: escaping, broken input, and chart geometry worked out by hand."""

import copy
import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dpo_mlx.files import jsonl
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.files.results import Evaluation
from dpo_mlx.report import charts, html_report, templates
from runs import wrote

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div></main>",
    "\"><img src=x onerror='alert(2)'>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "line\n\n  indented\t日本語 🙂 العربية \u2028 \u202e reversed",
]


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.125, "high": value + 0.125}


REPORT: dict[str, Any] = {
    "verdict": {"passed": True, "grade": "in your voice", "summary": "It has it.", "reasons": []},
    "voice": {
        "way": interval(0.75),
        "other_system_message": interval(0.5),
        "detection": {
            "base": interval(0.875),
            "tuned": interval(0.625),
            "p_value": 0.25,
            "calibration": 0.51,
        },
    },
    "fluency": {
        "distinct2": {"base": 0.91, "tuned": 0.92, "chosen": 0.98},
        "longest_loop": {"base": 1.5, "tuned": 3.25, "chosen": 0.0},
        "self_ended": {"base": 0.75, "tuned": 0.5, "chosen": 1.0},
        "base_logprob_per_token": {"base": -0.6, "tuned": -1.3, "chosen": -3.1},
        "sense": {"base": 0.9, "tuned": 0.4, "chosen": 0.7},
        "median_tokens": {"base": 150.0, "tuned": 117.0, "chosen": 126.0},
        "copied": {"base": 0.0, "tuned": 0.125, "chosen": 0.0},
    },
    "preference": {
        "accuracy": 1.0,
        "margin": 4.1,
        "chosen_per_token": -2.5,
        "rejected_per_token": -1.2,
    },
    "fuse": {
        "margin_adapters": 41.0,
        "margin_fused": 40.6,
        "margin_kept": 0.99,
        "max_logprob_difference": 0.2,
    },
    "habits": [
        {
            "name": f'uses "{HOSTILE[0]}"',
            "yours": 1.0,
            "base": 0.0,
            "tuned": 0.25,
            "is_share": True,
            "carried": False,
        },
        {
            "name": "commas per 100 words",
            "yours": 3.25,
            "base": 6.5,
            "tuned": 3.5,
            "is_share": False,
            "carried": True,
        },
    ],
    "training": {
        "updates": 4,
        "sft_updates": 2,
        "end_of_sft": asdict(Evaluation(2, wrote(voice=0.5))),
        "last": asdict(Evaluation(4, wrote(voice=0.5))),
        "kept": asdict(Evaluation(2, wrote(voice=0.5))),
        "stopped": [],
        "notes": [],
        "adapters": "0" * 64,
    },
    "cost": {
        "divergence": {"value": 0.125, "low": 0.1, "high": 0.15},
        "instructions": {
            "base": 0.5,
            "tuned": 0.25,
            "tasks": 40,
            "lost": 12,
            "gained": 2,
            "change": interval(-0.25),
        },
        "choices": {
            "base": 0.75,
            "tuned": 0.5,
            "tasks": 60,
            "lost": 20,
            "gained": 5,
            "change": interval(-0.25),
        },
    },
    "dpo_added": {
        "end_of_sft": wrote(voice=0.5).means,
        "dpo": wrote(voice=0.75).means,
        "voice": {"value": 0.25, "low": -0.125, "high": 0.5},
    },
    "run": {
        "config": {
            "model": "a/model",
            "run_dir": "data/runs/a",
            "system_prompt": HOSTILE[0],
            "train": {"learning_rate": 1e-6, "schedule": "cosine", "replay": 2},
            "lora": {"keys": None},
            "dpo": {"loss": "sigmoid"},
        },
        "pairs": {
            "train": 58,
            "valid": 13,
            "dropped": {"copy of another row": 3, HOSTILE[0]: 1},
            "rejected_finish": {"stop": 53, "length": 18},
            "tokens": {
                "percentiles": [5, 25, 50, 75, 95, 100],
                "chosen": [98, 112, 124, 133, 149, 163],
                "rejected": [31, 84, 149, 192, 192, 192],
            },
        },
    },
    "answers": [
        {"question": text, "base": text, "tuned": text, "chosen": text} for text in HOSTILE
    ],
}


def sft_row(update: int) -> dict[str, Any]:
    return {
        "iteration": update,
        "phase": "sft",
        "nll_loss": 3.0,
        "peak_memory_gb": 2.0,
        "tokens_per_second": 100.0,
    }


def train_row(update: int, **changed: float) -> dict[str, Any]:
    return {
        "iteration": update,
        "phase": "dpo",
        "loss": 0.6,
        "rewards/margins": 0.2,
        "logps/chosen_per_token": -3.0,
        "logps/rejected_per_token": -1.0,
        "peak_memory_gb": 2.0,
        "tokens_per_second": 100.0,
        **changed,
    }


def valid_row(update: int, loss: float, phase: str = "dpo", voice: float = 0.5) -> dict[str, Any]:
    return {
        "iteration": update,
        "phase": phase,
        "eval_loss": loss,
        "eval_rewards/margins": 0.1,
        "eval_logps/chosen_per_token": -3.0,
        "eval_logps/rejected_per_token": -1.0,
        "eval_text/voice": voice,
        "eval_text/distinct2": 0.9,
        "eval_text/self_ended": 1.0,
    }


# Two updates of SFT, then two of DPO. The model after update 2 is evaluated in both phases.
METRICS = [
    valid_row(0, 0.69, "sft", voice=0.0),
    sft_row(1),
    sft_row(2),
    valid_row(2, 0.3, "sft"),
    valid_row(2, 0.69),
    train_row(3),
    train_row(4),
    valid_row(4, 0.5, voice=1.0),
]


class Page(HTMLParser):
    """A parsed page: elements with their attributes, its text, style and heading."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self.heading = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
            return
        self.text += data
        if self._inside == "h1":
            self.heading += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def changed(**sections: Any) -> dict[str, Any]:
    """REPORT with some values of its sections replaced."""
    report = copy.deepcopy(REPORT)
    for name, values in sections.items():
        report[name] |= values
    return report


def test_outside_text_is_shown_and_never_becomes_markup() -> None:
    """An answer must not run a script or close an element of the page."""
    page = Page(html_report.render(REPORT, METRICS))
    for text in HOSTILE:
        assert page.text.count(text) >= 4  # as question, base, tuned and chosen, whitespace kept
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "iframe", "object"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_hostile_text_does_not_change_the_structure() -> None:
    """The page has the same elements as with harmless text, not just no dangerous ones."""
    harmless = json.loads(json.dumps(REPORT))
    harmless["answers"] = [dict.fromkeys(row, "plain words") for row in REPORT["answers"]]
    harmless["run"]["pairs"]["dropped"] = {"copy of another row": 3, "another reason": 1}
    harmless["run"]["config"]["system_prompt"] = "plain words"
    assert (
        Page(html_report.render(REPORT, METRICS)).elements
        == Page(html_report.render(harmless, METRICS)).elements
    )


def test_page_loads_nothing_from_anywhere() -> None:
    """The report opens from disk without a network and contacts nobody."""
    page = Page(html_report.render(REPORT, METRICS))
    for tag, attrs in page.elements:
        assert tag not in {"link", "script", "iframe", "base"}
        assert not attrs.keys() & {"src", "srcset", "href", "xlink:href", "data", "action", "style"}
        assert not [v for v in attrs.values() if v and "http" in v.replace("http-equiv", "")]
    assert page.style
    assert not [word for word in ("http", "url(", "@import", "@font-face") if word in page.style]


def test_reasons_are_shown_in_words() -> None:
    """A reader who cannot tell the colours apart still sees why it failed."""
    reasons = ["smoke.max_divergence: 0.9, but at most 0.5 is allowed"]
    report = changed(verdict={"passed": False, "grade": "costs too much", "reasons": reasons})
    page = Page(html_report.render(report, METRICS))
    assert page.heading == "Costs too much" and reasons[0] in page.text
    assert "very differently from the base model" in page.text


@pytest.mark.parametrize(
    ("grade", "stopped", "expected"),
    [
        ("in your voice", [], "In your voice"),
        ("on the way", [], "On the way to your voice"),
        ("unmoved", [], "Did not move"),
        ("not measured", [], "Could not be measured"),
        ("degenerated", [], "Degenerated"),
        ("costs too much", [], "Costs too much"),
        ("unmoved", ["a reason"], "Training was stopped"),
        ("in your voice", ["a reason"], "In your voice"),
        ("made up later", [], "Made up later"),
    ],
)
def test_heading(grade: str, stopped: list[str], expected: str) -> None:
    """The heading names the grade. It names an early stop only when that is the cause."""
    report = changed(verdict={"grade": grade}, training={"stopped": stopped})
    assert Page(html_report.render(report, METRICS)).heading == expected


def test_reasons_for_a_stop_are_shown_and_escaped() -> None:
    """Each reason is on the page, with the update of the stop and the update of the adapters."""
    whole = Page(html_report.render(REPORT, METRICS))
    page = Page(html_report.render(changed(training={"stopped": HOSTILE}), METRICS))
    for text in HOSTILE:
        assert page.text.count(text) == whole.text.count(text) + 1
    assert "at update 4." in page.text
    assert "the model after update 2 of 4 (the end of SFT). Training stopped" in page.text
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in whole.elements}


def test_a_whole_run_was_not_stopped() -> None:
    """A run that was not stopped has no line about an early stop."""
    assert "stopped early" not in Page(html_report.render(REPORT, METRICS)).text


def test_untrained_adapters_are_named() -> None:
    """A run that stops before it improves keeps update 0, which is the base model."""
    report = changed(training={"kept": kept(0), "stopped": ["a reason"]})
    assert "change nothing" in Page(html_report.render(report, METRICS)).text


def test_a_run_whose_training_is_unknown() -> None:
    """Without a record of training, the page has no dotted line and never shows `None`."""
    page = Page(html_report.render({**REPORT, "training": None}, METRICS))
    assert not page.with_class("kept")
    assert "dotted line" not in page.text
    assert "None" not in page.text
    assert len(Page(html_report.render(REPORT, METRICS)).with_class("kept")) == len(charts.CURVES)


def test_an_unknown_limit_is_still_shown() -> None:
    """A limit that the template does not know is on the page too."""
    reasons = ["smoke.new: 2 against a limit of 1"]
    report = changed(verdict={"passed": False, "reasons": reasons})
    assert reasons[0] in Page(html_report.render(report, METRICS)).text


def test_one_card_for_each_side_of_each_question() -> None:
    """Each of the 5 questions has the answers of the base model, the tuned model and the user."""
    page = Page(html_report.render(REPORT, METRICS))
    sides = [attrs["class"] for attrs in page.with_class("answer")]
    assert sides == ["answer base", "answer tuned", "answer chosen"] * len(HOSTILE)


def text_of(report: dict[str, Any]) -> str:
    return " ".join(Page(html_report.render(report, METRICS)).text.split())


def test_the_way_and_the_detector_have_their_intervals() -> None:
    """A figure without its interval would look surer than it is; without a figure there is a
    dash.
    """
    text = text_of(REPORT)
    assert "75% 62% to 88%" in text and "88% → 62% 50% to 75%" in text
    assert (
        "Between your own answers it reaches 51%" in text
        and "This may be chance (p = 0.25)" in text
    )
    unmeasured = {"way": None, "detection": None, "other_system_message": None}
    text = text_of(changed(voice=unmeasured))
    assert "too much alike, or too few" in text and "too few answers to try" in text


@pytest.mark.parametrize(
    ("eval_questions", "valid", "shared"), [(16, 5, 5), (3, 5, 3), (3, 7, 1), (3, 8, 0)]
)
def test_shared_questions_by_hand(eval_questions: int, valid: int, shared: int) -> None:
    """The report has 5 answers, to the last valid pairs; evaluations ask the first ones. The page
    says how many questions both have.
    """
    run = REPORT["run"]
    config = {**run["config"], "train": {"eval_questions": eval_questions, "replay": 0}}
    pairs = {**run["pairs"], "valid": valid}
    report = {**REPORT, "run": {"config": config, "pairs": pairs}}
    assert html_report.shared_questions(report) == shared
    assert (f"{shared} of which also helped to choose" in text_of(report)) is bool(shared)


def test_the_cost_is_shown() -> None:
    """Base beside tuned, with the number of prompts."""
    text = text_of(REPORT)
    assert "40 instructions" in text and "50%25%" in text.replace(" ", "")
    assert "60 questions" in text and "75%50%" in text.replace(" ", "")
    assert "00.12" in text.replace(" ", "")


def test_the_notes_of_the_preflight_reappear() -> None:
    """Too few pairs are a reason for a poor voice: the reader of the page must see it."""
    assert "41 train pairs: too few" in text_of(
        changed(training={"notes": ["41 train pairs: too few"]})
    )


def kept(update: int) -> dict[str, Any]:
    return asdict(Evaluation(update, wrote(voice=0.75)))


def test_every_measure_of_fluency_has_all_three_sides() -> None:
    """Each row shows base, tuned and your answers, so a reader can judge the tuned ones."""
    lines = " ".join(Page(html_report.render(REPORT, METRICS)).text.split())
    assert "without a loop has 0. 1.5 3.2 0.0 Ended by itself" in lines
    assert "how to stop. 75% 50% 100% Log-prob" in lines


def test_measures_that_are_nan_or_infinite() -> None:
    """Empty answers have -inf nats per token. The page shows a dash, never `inf` or `nan`."""
    report = changed(
        voice={"way": dict.fromkeys(("value", "low", "high"), math.nan)},
        fluency={
            "base_logprob_per_token": {"base": -0.6, "tuned": -math.inf, "chosen": -3.0},
        },
    )
    page = Page(html_report.render(report, METRICS))
    assert not [word for word in page.text.split() if word.strip("−%") in {"nan", "inf"}]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [valid_row(0, 0.69)],
        [train_row(1)],
        [valid_row(0, 0.69, "sft"), sft_row(1)],
        [valid_row(0, math.nan), train_row(1, loss=math.inf), train_row(2, loss=-math.inf)],
    ],
    ids=["nothing", "one evaluation", "one update", "only sft", "nothing finite"],
)
def test_short_and_broken_runs_are_drawn(rows: list[dict[str, Any]]) -> None:
    """A run that stopped early or degenerated gets a page without broken coordinates."""
    page = Page(html_report.render(REPORT, rows))
    coordinates = [
        v for _, attrs in page.elements for k, v in attrs.items() if k in {"d", "cx", "cy"}
    ]
    assert coordinates
    assert not [value for value in coordinates if value and ("nan" in value or "inf" in value)]


def test_values_left_out_are_counted() -> None:
    """The chart draws the finite value, and the caption counts the two others."""
    rows = [train_row(1, loss=math.nan), train_row(2), train_row(3, loss=math.inf)]
    chart = charts.chart(rows, "loss", None)
    assert (chart.skipped, len(chart.curves[0].points)) == (2, 1)
    assert "Not drawn: 2 values" in Page(html_report.render(REPORT, rows)).text


def test_points_of_a_curve() -> None:
    """By hand: updates 0..2 fill 54..348, so update 1 lies at 201. Losses 0 and 1 get 6% of room,
    so [-0.06, 1.06] fills 204..34 upwards: 0 lies at 204 - 170 * 0.06 / 1.12 = 194.89, 1 at 43.11.
    """
    chart = charts.chart([valid_row(0, 1.0), train_row(1, loss=1.0), valid_row(2, 0.0)], "loss", 1)
    train, valid = chart.curves
    assert train.points == [(201, 43.11)]
    assert valid.points == [(54, 43.11), (348, 194.89)]
    assert valid.path == "M54 43.11L348 194.89h0"
    assert [tick.at for tick in chart.x_ticks] == [54, 201, 348]


def test_voice_is_drawn_over_both_phases() -> None:
    """By hand: updates 0..4 fill 54..348, scores 0..1 fill 204..34."""
    [curve] = charts.chart(METRICS, "voice", 2).curves
    assert curve.points == [(54, 204), (201, 119), (201, 119), (348, 34)]


def test_a_voice_beyond_the_scale_stays_in_the_chart() -> None:
    """The base model's answers can lie just below 0, and yours are not the limit."""
    rows = [valid_row(0, 0.69, voice=-0.25), valid_row(1, 0.69, voice=1.25)]
    [curve] = charts.chart(rows, "voice", None).curves
    top, bottom = charts.FRAME["top"], charts.FRAME["bottom"]
    assert [y for _, y in curve.points] == [bottom, top]


def test_shares_are_drawn_from_0_to_1() -> None:
    """A rise of 0.02 must not fill the chart."""
    rows = [valid_row(0, 0.69, voice=0.1), valid_row(1, 0.69, voice=0.12)]
    for name in ("voice", "fluency"):
        labels = [tick.label for tick in charts.chart(rows, name, None).y_ticks]
        assert (labels[0], labels[-1]) == ("0.0", "1.0")


@pytest.mark.parametrize("name", ["loss", "margin"])
def test_sft_is_left_out_of_loss_and_margin(name: str) -> None:
    """Both are relative to the start of a phase, so SFT's values do not continue in DPO. The x axis
    still covers the whole run.
    """
    chart = charts.chart(METRICS, name, None)
    train, valid = chart.curves
    assert [x for x, _ in train.points] == [274.5, 348]
    assert [x for x, _ in valid.points] == [201, 348]
    assert chart.x_ticks == charts.chart(METRICS, "voice", None).x_ticks


@pytest.mark.parametrize("name", charts.CURVES)
def test_vertical_lines(name: str) -> None:
    """Every chart has them at the same x: of updates 0..4, DPO begins at 2 and 3 is kept."""
    chart = charts.chart(METRICS, name, 3)
    assert (chart.dpo_x, chart.kept_x) == (201, 274.5)


def test_the_phase_is_named_in_every_chart() -> None:
    """A label names the line where DPO begins."""
    text = Page(html_report.render(REPORT, METRICS)).text
    assert text.count("DPO begins") == len(charts.CURVES)
    assert "4 updates: 2 of SFT, 2 of DPO." in text


def test_a_run_without_sft() -> None:
    """The page has no phase line and does not mention SFT. The loss starts at update 0."""
    rows = [valid_row(0, 0.69), train_row(1), train_row(2), valid_row(2, 0.5)]
    report = {**changed(training={"sft_updates": 0, "end_of_sft": None}), "dpo_added": None}
    page = Page(html_report.render(report, rows))
    assert not page.with_class("phase")
    assert "SFT" not in page.text
    assert [x for x, _ in charts.chart(rows, "loss", None).curves[1].points] == [54, 348]


def test_a_run_stopped_in_sft() -> None:
    """DPO never began, so there is no phase line, and the DPO charts say that they are empty."""
    page = Page(html_report.render(REPORT, METRICS[:4]))
    assert not page.with_class("phase")
    assert page.text.count("no values") == len(charts.ONLY_DPO)


def test_path_of_one_point_and_of_none() -> None:
    """Round line ends turn a line of length 0 into a dot. Without points the path is empty."""
    assert charts.path([(1.5, 2)]) == "M1.5 2h0"
    assert charts.path([]) == ""


def test_a_curve_that_hardly_moves_looks_flat() -> None:
    """The axis spans at least 2% of the values, so 0.6931 to 0.6930 does not look steep."""
    low, high = charts.padded([0.6931, 0.6930])
    assert high - low == pytest.approx(0.0001 + 0.02 * 0.6931)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.03, 0.69, [0.2, 0.4, 0.6]),  # 0.66 / 5 = 0.132, the next round step is 0.2
        (-3.2, -0.8, [-3, -2.5, -2, -1.5, -1]),  # 2.4 / 5 = 0.48, so 0.5
        (0.6, 0.8, [0.6, 0.65, 0.7, 0.75, 0.8]),  # both ends, though 0.6 / 0.05 is 11.999...
        (-40, 260, [0, 100, 200]),
    ],
)
def test_nice_ticks(low: float, high: float, expected: list[float]) -> None:
    """Round numbers within the range, worked out by hand."""
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


def test_update_ticks_are_whole_numbers() -> None:
    """A run of two updates has ticks 0, 1, 2, not 0.5."""
    assert charts.nice_ticks(0, 2, least_step=1) == [0, 1, 2]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3.2, -0.8, ["−3.0", "−2.5", "−2.0", "−1.5", "−1.0"]),
        (0, 500, ["0", "100", "200", "300", "400", "500"]),
        (0, 5e-5, ["0", "1e−05", "2e−05", "3e−05", "4e−05", "5e−05"]),
    ],
)
def test_tick_labels(low: float, high: float, expected: list[str]) -> None:
    """Labels have the decimals that the step needs, and fit in the margin."""
    assert [tick.label for tick in charts.ticks(charts.Scale(low, high, 0, 100))] == expected


def test_boxes_of_lengths() -> None:
    """By hand: 0..200 tokens fill 66..348, so 100 tokens lie at 66 + 282 / 2 = 207."""
    tokens = {"percentiles": [50, 100], "chosen": [100, 150], "rejected": [50, 200]}
    boxes = html_report.lengths(tokens)["boxes"]
    assert boxes == {"chosen": {50: 207, 100: 277.5}, "rejected": {50: 136.5, 100: 348}}


def test_speed_is_a_median_and_memory_a_maximum() -> None:
    """A slow first update does not change the speed. Memory is the peak."""
    measured = ((1, 5, 2.0), (2, 90, 3.0), (3, 95, 2.5))
    rows = [train_row(i, tokens_per_second=s, peak_memory_gb=m) for i, s, m in measured]
    cost = html_report.run_cost(rows)
    assert (cost["tokens_per_second"], cost["peak_memory_gb"], cost["updates"]) == (90, 3, 3)


def test_settings_read_like_the_config() -> None:
    """Every key is there with its value as in the YAML file, but text has no quotes."""
    sections = html_report.sections(REPORT["run"]["config"])
    assert list(sections) == ["run", "train", "lora", "dpo"]
    values = [None, True, 1e-06, "cosine", "", ["q_proj"]]
    assert [templates.setting(v) for v in values] == [
        "null", "true", "1e-06", "cosine", '""', '["q_proj"]'
    ]  # fmt: skip


def test_file_is_written_whole(tmp_path: Path) -> None:
    """The page comes from metrics.jsonl, and no temporary file remains."""
    metrics = tmp_path / "metrics.jsonl"
    jsonl.append(metrics, METRICS)
    html_report.write_html(tmp_path / "report.html", REPORT, metrics)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html_report.render(
        REPORT, METRICS
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        MANIFEST,
        "metrics.jsonl",
        "report.html",
    ]


@pytest.mark.parametrize(
    ("kept_update", "words"),
    [
        (
            2,
            "This is the model after update 2 of 4 (the end of SFT). This is the supervised model: "
            "DPO did not improve on it. To give DPO more to work with",
        ),
        (4, "This is the model after update 4 of 4 (the end of DPO). DPO improved on SFT."),
    ],
)
def test_the_page_says_what_dpo_added(kept_update: int, words: str) -> None:
    """Beside the verdict: a model that is only SFT's is not sold as DPO's."""
    assert words in text_of(changed(training={"kept": kept(kept_update)}))


def test_what_dpo_added_has_an_interval() -> None:
    """Whichever model was kept, and with a warning when chance explains the change."""
    text = text_of(changed(training={"kept": kept(4)}))
    assert "changed by +0.25 of the way, with a 95% interval of −0.12 to +0.50" in text
    assert "chance alone" in text
    surely = {"value": 0.25, "low": 0.125, "high": 0.5}
    text = text_of(changed(training={"kept": kept(4)}, dpo_added={"voice": surely}))
    assert "chance alone" not in text
    assert "What DPO added" not in text_of({**REPORT, "dpo_added": None})


def test_habits_are_shown_in_figures() -> None:
    """Shares in percent, amounts as numbers, and how many carried over; without any, a sentence."""
    text = " ".join(Page(html_report.render(REPORT, METRICS)).text.split())
    assert "1 of 2 carried over" in text
    assert "0%25%100%no" in text and "commas per 100 words6.53.53.2yes" in text
    text = " ".join(Page(html_report.render({**REPORT, "habits": []}, METRICS)).text.split())
    assert "No countable habit tells your answers" in text


def test_copying_is_shown_beside_your_own_answers() -> None:
    """A model that recites 12.5% of its training answers is seen on the page."""
    text = " ".join(Page(html_report.render(REPORT, METRICS)).text.split())
    assert "12.5%" in text and "one of your training answers has, too" in text
