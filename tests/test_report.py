"""The report page: what it may never contain, what it must survive, and its chart maths by hand."""

import copy
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dpo_mlx import report

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div></main>",
    "\"><img src=x onerror='alert(2)'>",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp;",
    "line\n\n  indented\t日本語 🙂 العربية \u2028 \u202e reversed",
]

REPORT: dict[str, Any] = {
    "verdict": {"passed": True, "summary": "Learned the voice.", "crossed": []},
    "voice": {"share": 0.6, "base": 0.1, "tuned": 0.8, "chosen": 0.9, "classifier_accuracy": 0.97},
    "fluency": {
        "distinct2": {"base": 0.91, "tuned": 0.92, "chosen": 0.98},
        "self_ended": {"base": 0.75, "tuned": 1.0},
        "base_logprob_per_token": {"base": -0.6, "tuned": -1.3},
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


def train_row(update: int, **changed: float) -> dict[str, Any]:
    return {
        "iteration": update,
        "loss": 0.6,
        "rewards/margins": 0.2,
        "logps/chosen_per_token": -3.0,
        "logps/rejected_per_token": -1.0,
        "peak_memory_gb": 2.0,
        "tokens_per_second": 100.0,
        **changed,
    }


def valid_row(update: int, loss: float) -> dict[str, Any]:
    return {
        "iteration": update,
        "eval_loss": loss,
        "eval_rewards/margins": 0.1,
        "eval_logps/chosen_per_token": -3.0,
        "eval_logps/rejected_per_token": -1.0,
    }


METRICS = [valid_row(0, 0.69), train_row(1), train_row(2), valid_row(2, 0.5)]


class Page(HTMLParser):
    """A page as a browser takes it apart: elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.text += data

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
    page = Page(report.render(REPORT, METRICS))
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
        Page(report.render(REPORT, METRICS)).elements
        == Page(report.render(harmless, METRICS)).elements
    )


def test_page_loads_nothing_from_anywhere() -> None:
    """The report opens from disk without a network, and tells nobody that it was opened."""
    page = Page(report.render(REPORT, METRICS))
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
    page = Page(report.render(changed(verdict={"passed": passed, "crossed": crossed}), METRICS))
    assert ("Not passed" in page.text) is not passed
    assert all(line in page.text for line in crossed)


def test_an_unknown_limit_is_still_shown() -> None:
    """A limit added to the smoke test later must not break the page or be left out of it."""
    crossed = ["smoke.new: 2 against a limit of 1"]
    made = changed(verdict={"passed": False, "crossed": crossed})
    assert crossed[0] in Page(report.render(made, METRICS)).text


def test_one_card_for_each_side_of_each_question() -> None:
    """No answer is left out: 5 questions have 5 answers of base, of tuned and of the user."""
    page = Page(report.render(REPORT, METRICS))
    sides = [attrs["class"] for attrs in page.with_class("answer")]
    assert sides == ["answer base", "answer tuned", "answer chosen"] * len(HOSTILE)


def test_share_is_counted_in_questions() -> None:
    """A share of 0.6 of 5 questions is told as 3 of 5."""
    assert "3 of 5 questions" in " ".join(Page(report.render(REPORT, METRICS)).text.split())


def test_pairs_brought_by_the_user() -> None:
    """Without stage 06 there is no pairs report; the section says so and draws no boxes."""
    page = Page(report.render(changed(run={"pairs": None}), METRICS))
    assert "ready-made" in page.text
    assert not page.with_class("boxes")


def test_no_margin_to_keep() -> None:
    """margin_kept is None when the adapters learned nothing; the length takes its place."""
    page = Page(report.render(changed(fuse={"margin_kept": None}), METRICS))
    assert "Median length" in page.text
    assert "None" not in page.text


def test_measures_that_are_no_numbers() -> None:
    """A model that says nothing has -inf nats a token; the page shows a dash, never `inf`."""
    nan_everywhere = dict.fromkeys(REPORT["voice"], math.nan)
    made = changed(
        voice=nan_everywhere,
        fluency={"base_logprob_per_token": {"base": -0.6, "tuned": -math.inf}},
    )
    page = Page(report.render(made, METRICS))
    assert not [word for word in page.text.split() if word.strip("−%") in {"nan", "inf"}]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [valid_row(0, 0.69)],
        [train_row(1)],
        [valid_row(0, math.nan), train_row(1, loss=math.inf), train_row(2, loss=-math.inf)],
    ],
    ids=["nothing", "one evaluation", "one update", "nothing finite"],
)
def test_short_and_broken_runs_are_drawn(rows: list[dict[str, Any]]) -> None:
    """A run that stopped early or degenerated still gets a page, without a broken coordinate."""
    page = Page(report.render(REPORT, rows))
    drawn = [v for _, attrs in page.elements for k, v in attrs.items() if k in {"d", "cx", "cy"}]
    assert drawn
    assert not [value for value in drawn if value and ("nan" in value or "inf" in value)]


def test_values_left_out_are_counted() -> None:
    """Two values that are not finite are told under the chart, the finite ones are drawn."""
    rows = [train_row(1, loss=math.nan), train_row(2), train_row(3, loss=math.inf)]
    chart = report.chart(rows, "loss", None)
    assert (chart.skipped, len(chart.curves[0].points)) == (2, 1)
    assert "Not drawn: 2 values" in Page(report.render(REPORT, rows)).text


def test_places_of_a_curve() -> None:
    """By hand: updates 0..2 fill 54..348, so update 1 lies at 201. Losses 0 and 1 get 6% of room,
    so [-0.06, 1.06] fills 198..28 upwards: 0 lies at 198 - 170 * 0.06 / 1.12 = 188.89, 1 at 37.11.
    """
    chart = report.chart([valid_row(0, 1.0), train_row(1, loss=1.0), valid_row(2, 0.0)], "loss", 2)
    train, valid = chart.curves
    assert train.points == [(201, 37.11)]
    assert valid.points == [(54, 37.11), (348, 188.89)]
    assert valid.path == "M54 37.11L348 188.89h0"
    assert chart.best == 348
    assert [tick.at for tick in chart.x_ticks] == [54, 201, 348]


def test_path_of_one_place_and_of_none() -> None:
    """A line of no length is drawn as a dot by its round ends; no place draws nothing."""
    assert report.path([(1.5, 2)]) == "M1.5 2h0"
    assert report.path([]) == ""


def test_a_curve_that_hardly_moves_looks_flat() -> None:
    """0.6931 to 0.6930 must not fill the chart like a steep fall: 2% of the size is shown."""
    low, high = report.padded([0.6931, 0.6930])
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
    assert report.nice_ticks(low, high) == pytest.approx(expected)


def test_updates_are_counted_in_whole_numbers() -> None:
    """A run of two updates has ticks 0, 1, 2, not 0.5."""
    assert report.nice_ticks(0, 2, least_step=1) == [0, 1, 2]


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
    assert [tick.label for tick in report.ticks(report.Scale(low, high, 0, 100))] == expected


def test_boxes_of_lengths() -> None:
    """By hand: 0..200 tokens fill 66..348, so 100 tokens lie at 66 + 282 / 2 = 207."""
    tokens = {"percentiles": [50, 100], "chosen": [100, 150], "rejected": [50, 200]}
    boxes = report.lengths(tokens)["boxes"]
    assert boxes == {"chosen": {50: 207, 100: 277.5}, "rejected": {50: 136.5, 100: 348}}


def test_best_update_is_the_first_with_the_least_loss() -> None:
    """The trainer keeps adapters only when the loss falls: of two equal ones, the first."""
    rows = [valid_row(0, 0.69), valid_row(4, math.nan), valid_row(8, 0.5), valid_row(12, 0.5)]
    assert report.best_update(rows) == 8
    assert report.best_update([train_row(1)]) is None


def test_speed_is_a_median_and_memory_a_maximum() -> None:
    """A slow first update does not count for the speed; memory counts at its height."""
    measured = ((1, 5, 2.0), (2, 90, 3.0), (3, 95, 2.5))
    rows = [train_row(i, tokens_per_second=s, peak_memory_gb=m) for i, s, m in measured]
    made = report.training(rows, None)
    assert (made["tokens_per_second"], made["peak_memory_gb"], made["updates"]) == (90, 3, 3)


def test_settings_read_like_the_config() -> None:
    """Every key is there, as in the YAML file: null, true and numbers; texts without quotes."""
    sections = report.sections(REPORT["run"]["config"])
    assert list(sections) == ["run", "train", "lora", "dpo"]
    values = [None, True, 1e-06, "cosine", "", ["q_proj"]]
    assert [report.setting(v) for v in values] == [
        "null", "true", "1e-06", "cosine", '""', '["q_proj"]'
    ]  # fmt: skip


def test_file_is_written_whole(tmp_path: Path) -> None:
    """It comes from metrics.jsonl, a torn last line left out, and leaves no temporary file."""
    metrics = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps(row) + "\n" for row in METRICS)
    metrics.write_text(rows + '{"iterat', encoding="utf-8")
    report.write_html(tmp_path / "report.html", REPORT, metrics)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report.render(REPORT, METRICS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
