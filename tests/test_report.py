"""The report page: what it may never contain, what it must survive, and its chart maths by hand."""

import copy
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dpo_mlx.files import jsonl
from dpo_mlx.files.ownership import MANIFEST
from dpo_mlx.report import charts, html_report, templates

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div></main>",
    "\"><img src=x onerror='alert(2)'>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "line\n\n  indented\t日本語 🙂 العربية \u2028 \u202e reversed",
]

REPORT: dict[str, Any] = {
    "verdict": {"passed": True, "outcome": "learned", "summary": "It has it.", "crossed": []},
    "voice": {"share": 0.6, "base": 0.1, "tuned": 0.8, "chosen": 0.9, "classifier_accuracy": 0.97},
    "fluency": {
        "distinct2": {"base": 0.91, "tuned": 0.92, "chosen": 0.98},
        "longest_loop": {"base": 1.5, "tuned": 3.25, "chosen": 0.0},
        "self_ended": {"base": 0.75, "tuned": 0.5, "chosen": 1.0},
        "base_logprob_per_token": {"base": -0.6, "tuned": -1.3, "chosen": -3.1},
        "median_tokens": {"base": 150.0, "tuned": 117.0, "chosen": 126.0},
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
    "training": {"updates": 4, "sft_updates": 2, "kept_update": 2, "voice": 0.8, "stopped": []},
    "run": {
        "config": {
            "model": "a/model",
            "run_dir": "data/runs/a",
            "system_prompt": HOSTILE[0],
            "train": {"learning_rate": 1e-6, "schedule": "cosine"},
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
        "eval_text/greedy_voice": voice / 2,
        "eval_text/distinct2": 0.9,
        "eval_text/greedy_distinct2": 0.8,
        "eval_text/self_ended": 1.0,
    }


# Two updates of SFT, then two of DPO: the same model is evaluated at the end of one and at the
# beginning of the other.
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
    """A page as a browser takes it apart: elements with their attributes, and its text."""

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
    """REPORT with some of the values inside its sections replaced."""
    made = copy.deepcopy(REPORT)
    for name, values in sections.items():
        made[name] |= values
    return made


def test_every_text_from_outside_is_shown_and_none_becomes_markup() -> None:
    """An answer must not be able to run a script or close an element of the page it stands in."""
    page = Page(html_report.render(REPORT, METRICS))
    for text in HOSTILE:
        assert page.text.count(text) >= 4  # as question, base, tuned and chosen, whitespace kept
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "iframe", "object"}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_hostile_text_does_not_change_the_structure() -> None:
    """Not only the tags known to be dangerous: the elements are those of a harmless report."""
    harmless = json.loads(json.dumps(REPORT))
    harmless["answers"] = [dict.fromkeys(row, "plain words") for row in REPORT["answers"]]
    harmless["run"]["pairs"]["dropped"] = {"copy of another row": 3, "another reason": 1}
    harmless["run"]["config"]["system_prompt"] = "plain words"
    assert (
        Page(html_report.render(REPORT, METRICS)).elements
        == Page(html_report.render(harmless, METRICS)).elements
    )


def test_page_loads_nothing_from_anywhere() -> None:
    """The report opens from disk without a network, and tells nobody that it was opened."""
    page = Page(html_report.render(REPORT, METRICS))
    for tag, attrs in page.elements:
        assert tag not in {"link", "script", "iframe", "base"}
        assert not attrs.keys() & {"src", "srcset", "href", "xlink:href", "data", "action", "style"}
        assert not [v for v in attrs.values() if v and "http" in v.replace("http-equiv", "")]
    assert page.style
    assert not [word for word in ("http", "url(", "@import", "@font-face") if word in page.style]


@pytest.mark.parametrize("passed", [True, False])
def test_verdict_is_told_in_words(passed: bool) -> None:
    """Somebody who cannot tell the colours apart still reads whether it passed, and why not."""
    crossed = [] if passed else ["smoke.min_voice_share: 0.2 against a limit of 0.6"]
    page = Page(
        html_report.render(changed(verdict={"passed": passed, "crossed": crossed}), METRICS)
    )
    assert ("Not passed" in page.text) is not passed
    assert ("Passed" in page.text) is passed
    assert all(line in page.text for line in crossed)


@pytest.mark.parametrize(
    ("outcome", "stopped", "expected"),
    [
        ("learned", [], "Learned the voice"),
        ("unmoved", [], "Did not move"),
        ("degenerated", [], "Degenerated"),
        ("lost in fusing", [], "Lost in fusing"),
        ("unmoved", ["a reason"], "Training was stopped"),
        ("learned", ["a reason"], "Learned the voice"),
        ("made up later", [], "Made up later"),
    ],
)
def test_heading(outcome: str, stopped: list[str], expected: str) -> None:
    """The largest words say what became of the model; a stop only where it is the cause."""
    made = changed(verdict={"outcome": outcome}, training={"stopped": stopped})
    assert Page(html_report.render(made, METRICS)).heading == expected


def test_reasons_for_a_stop_are_told_and_escaped() -> None:
    """Each is on the page once more than without the stop, whatever is in it, beside when it was
    and what was kept.
    """
    whole = Page(html_report.render(REPORT, METRICS))
    page = Page(html_report.render(changed(training={"stopped": HOSTILE}), METRICS))
    for text in HOSTILE:
        assert page.text.count(text) == whole.text.count(text) + 1
    assert "at update 4. This model uses the adapters of update 2." in page.text
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in whole.elements}


def test_a_whole_run_was_not_stopped() -> None:
    """Nothing of guards stopping it at the top."""
    assert "stopped early" not in Page(html_report.render(REPORT, METRICS)).text


def test_untrained_adapters_are_called_so() -> None:
    """A run stopped before anything was better keeps update 0: a model that is the base model."""
    made = changed(training={"kept_update": 0, "stopped": ["a reason"]})
    assert "change nothing" in Page(html_report.render(made, METRICS)).text


def test_a_run_whose_training_is_unknown() -> None:
    """Adapters may come from elsewhere: no kept line, no stop, dashes, no `None`."""
    page = Page(html_report.render({**REPORT, "training": None}, METRICS))
    assert not page.with_class("kept")
    assert "dotted line" not in page.text
    assert "None" not in page.text
    assert len(Page(html_report.render(REPORT, METRICS)).with_class("kept")) == len(charts.CURVES)


def test_an_unknown_limit_is_still_shown() -> None:
    """A limit added to the smoke test later must not break the page or be left out of it."""
    crossed = ["smoke.new: 2 against a limit of 1"]
    made = changed(verdict={"passed": False, "crossed": crossed})
    assert crossed[0] in Page(html_report.render(made, METRICS)).text


def test_one_card_for_each_side_of_each_question() -> None:
    """No answer is left out: 5 questions have 5 answers of base, of tuned and of the user."""
    page = Page(html_report.render(REPORT, METRICS))
    sides = [attrs["class"] for attrs in page.with_class("answer")]
    assert sides == ["answer base", "answer tuned", "answer chosen"] * len(HOSTILE)


def test_share_is_counted_in_questions() -> None:
    """A share of 0.6 of 5 questions is told as 3 of 5."""
    assert "3 of 5 questions" in " ".join(Page(html_report.render(REPORT, METRICS)).text.split())


def test_pairs_brought_by_the_user() -> None:
    """Without stage 06 there is no pairs report; the section says so and draws no boxes."""
    page = Page(html_report.render(changed(run={"pairs": None}), METRICS))
    assert "ready-made" in page.text
    assert not page.with_class("boxes")


def test_no_margin_to_keep() -> None:
    """margin_kept is None when the adapters learned nothing; a dash stands for it."""
    page = Page(html_report.render(changed(fuse={"margin_kept": None}), METRICS))
    assert "margin kept–" in page.text
    assert "None" not in page.text


def test_every_measure_of_fluency_has_all_three_sides() -> None:
    """Without the real answers beside it nobody can tell a measure of the tuned ones as good or
    bad; the row of the longest repetition is checked by hand.
    """
    lines = " ".join(Page(html_report.render(REPORT, METRICS)).text.split())
    assert "without a loop has 0. 1.5 3.2 0.0 Ended by itself" in lines
    assert "how to stop. 75% 50% 100% Log-prob" in lines


def test_measures_that_are_no_numbers() -> None:
    """A model that says nothing has -inf nats a token; the page shows a dash, never `inf`."""
    nan_everywhere = dict.fromkeys(REPORT["voice"], math.nan)
    made = changed(
        voice=nan_everywhere,
        fluency={
            "base_logprob_per_token": {"base": -0.6, "tuned": -math.inf, "chosen": -3.0},
        },
    )
    page = Page(html_report.render(made, METRICS))
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
    """A run that stopped early or degenerated still gets a page, without a broken coordinate."""
    page = Page(html_report.render(REPORT, rows))
    drawn = [v for _, attrs in page.elements for k, v in attrs.items() if k in {"d", "cx", "cy"}]
    assert drawn
    assert not [value for value in drawn if value and ("nan" in value or "inf" in value)]


def test_values_left_out_are_counted() -> None:
    """Two values that are not finite are told under the chart, the finite ones are drawn."""
    rows = [train_row(1, loss=math.nan), train_row(2), train_row(3, loss=math.inf)]
    chart = charts.chart(rows, "loss", None)
    assert (chart.skipped, len(chart.curves[0].points)) == (2, 1)
    assert "Not drawn: 2 values" in Page(html_report.render(REPORT, rows)).text


def test_places_of_a_curve() -> None:
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
    """By hand: updates 0..4 fill 54..348, scores 0..1 fill 204..34. Greedy ones are half of it."""
    sampled, greedy = charts.chart(METRICS, "voice", 2).curves
    assert sampled.points == [(54, 204), (201, 119), (201, 119), (348, 34)]
    assert greedy.points == [(54, 204), (201, 161.5), (201, 161.5), (348, 119)]


def test_shares_are_drawn_from_0_to_1() -> None:
    """A voice score that rises by 0.02 must not look like a voice that was learned."""
    rows = [valid_row(0, 0.69, voice=0.1), valid_row(1, 0.69, voice=0.12)]
    for name in ("voice", "fluency"):
        labels = [tick.label for tick in charts.chart(rows, name, None).y_ticks]
        assert (labels[0], labels[-1]) == ("0.0", "1.0")


@pytest.mark.parametrize("name", ["loss", "margin"])
def test_sft_is_left_out_of_loss_and_margin(name: str) -> None:
    """They are measured from where a phase began: SFT's 0.3 nats below the base model would be
    joined to DPO's ln 2. The x range stays that of the whole run.
    """
    chart = charts.chart(METRICS, name, None)
    train, valid = chart.curves
    assert [x for x, _ in train.points] == [274.5, 348]
    assert [x for x, _ in valid.points] == [201, 348]
    assert chart.x_ticks == charts.chart(METRICS, "voice", None).x_ticks


@pytest.mark.parametrize("name", charts.CURVES)
def test_lines_of_the_phase_and_of_what_was_kept(name: str) -> None:
    """In every chart at the same place: of updates 0..4, DPO begins at 2 and 3 is kept."""
    chart = charts.chart(METRICS, name, 3)
    assert (chart.dpo_begins, chart.kept) == (201, 274.5)


def test_the_phase_is_named_in_every_chart() -> None:
    """The line alone says nothing."""
    text = Page(html_report.render(REPORT, METRICS)).text
    assert text.count("DPO begins") == len(charts.CURVES)
    assert "4 updates: 2 of SFT, 2 of DPO." in text


def test_a_run_without_sft() -> None:
    """No line of a phase and no word of SFT; loss and margin are drawn from update 0."""
    rows = [valid_row(0, 0.69), train_row(1), train_row(2), valid_row(2, 0.5)]
    page = Page(html_report.render(REPORT, rows))
    assert not page.with_class("phase")
    assert "SFT" not in page.text
    assert [x for x, _ in charts.chart(rows, "loss", None).curves[1].points] == [54, 348]


def test_a_run_stopped_in_sft() -> None:
    """DPO never began: no line says it did, and charts of DPO alone say that they are empty."""
    page = Page(html_report.render(REPORT, METRICS[:4]))
    assert not page.with_class("phase")
    assert page.text.count("no values") == len(charts.ONLY_DPO)


def test_path_of_one_place_and_of_none() -> None:
    """A line of no length is drawn as a dot by its round ends; no place draws nothing."""
    assert charts.path([(1.5, 2)]) == "M1.5 2h0"
    assert charts.path([]) == ""


def test_a_curve_that_hardly_moves_looks_flat() -> None:
    """0.6931 to 0.6930 must not fill the chart like a steep fall: 2% of the size is shown."""
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
    """Round numbers inside the range, worked out by hand."""
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


def test_updates_are_counted_in_whole_numbers() -> None:
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
    """As many decimals as the step needs, all labels alike, and short enough for the margin."""
    assert [tick.label for tick in charts.ticks(charts.Scale(low, high, 0, 100))] == expected


def test_boxes_of_lengths() -> None:
    """By hand: 0..200 tokens fill 66..348, so 100 tokens lie at 66 + 282 / 2 = 207."""
    tokens = {"percentiles": [50, 100], "chosen": [100, 150], "rejected": [50, 200]}
    boxes = html_report.lengths(tokens)["boxes"]
    assert boxes == {"chosen": {50: 207, 100: 277.5}, "rejected": {50: 136.5, 100: 348}}


def test_speed_is_a_median_and_memory_a_maximum() -> None:
    """A slow first update does not count for the speed; memory counts at its height."""
    measured = ((1, 5, 2.0), (2, 90, 3.0), (3, 95, 2.5))
    rows = [train_row(i, tokens_per_second=s, peak_memory_gb=m) for i, s, m in measured]
    made = html_report.cost(rows)
    assert (made["tokens_per_second"], made["peak_memory_gb"], made["updates"]) == (90, 3, 3)


def test_settings_read_like_the_config() -> None:
    """Every key is there, as in the YAML file: null, true and numbers; texts without quotes."""
    sections = html_report.sections(REPORT["run"]["config"])
    assert list(sections) == ["run", "train", "lora", "dpo"]
    values = [None, True, 1e-06, "cosine", "", ["q_proj"]]
    assert [templates.setting(v) for v in values] == [
        "null", "true", "1e-06", "cosine", '""', '["q_proj"]'
    ]  # fmt: skip


def test_file_is_written_whole(tmp_path: Path) -> None:
    """It comes from metrics.jsonl, and leaves no temporary file."""
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
