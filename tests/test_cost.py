"""What training cost: rules by hand, the divergence against the exact one, the shipped tasks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from dpo_mlx.config import LoraConfig
from dpo_mlx.data.encoding import EncodedAnswer, Encoder
from dpo_mlx.data.pairs import LENGTH, STOP
from dpo_mlx.files.errors import UserError
from dpo_mlx.model.adapters import LORA_LAYERS, adapters_off, attach_lora
from dpo_mlx.model.loading import load_model
from dpo_mlx.model.sampling import Answer, batches, sampler
from dpo_mlx.parallel.worker import Worker
from dpo_mlx.voice import choices, cost
from dpo_mlx.voice.choices import Choice, check_choices, option_means, picks_right
from dpo_mlx.voice.cost import ModelResults, compare, divergence
from dpo_mlx.voice.instructions import KINDS, parse_rule, unwrap

# Rules ------------------------------------------------------------------------------------------

# Kind, parameters, an answer that follows the rule, an answer that does not.
Case = tuple[str, dict[str, Any], list[str], list[str]]
CASES: list[Case] = [
    (
        "words",
        {"least": 1, "most": 1},
        ["cold", "**Cold.**", '"Cold"', "twenty-one", "l'été", "ледяной", "3.5"],
        ["It is cold", "cold, warm", "...", ""],
    ),
    ("words", {"least": 5, "most": 5}, ["Vast, deep, blue; salty - alive!"], ["Blue and deep."]),
    (
        "sentences",
        {"count": 2},
        ["It rains. I stay in!", 'He said "Go." She went.', "Is it 3.5? Yes", "下雨了。我在家。"],
        ["It rains.", "One. Two. Three.", "Here they are:\nOne. Two."],
    ),
    (
        "bullets",
        {"count": 3},
        [
            "- a\n- b\n- c",
            "Tips:\n\n* **a**\n* b\n* c\n\nGood luck!",
            "•a\n•b\n•c",
            "- a\n  - x\n- b\n- c",
        ],
        ["- a\n- b", "1. a\n2. b\n3. c", "a, b, c", "**a**\n**b**\n**c**", "-a\n-b\n-c"],
    ),
    (
        "numbered",
        {"count": 3},
        ["1. a\n2. b\n3. c", "Here:\n1) a\n2) b\n3) c\nDone.", "**1.** a\n**2.** b\n**3.** c"],
        [
            "1. a\n2. b",
            "1. a\n2. b\n3. c\n4. d",
            "1. a\n1. b\n1. c",
            "- a\n- b\n- c",
            "3.5 of them",
        ],
    ),
    ("paragraphs", {"count": 2}, ["a\n\nb", "a\nb\n \nc"], ["a", "a\nb", "a\n\nb\n\nc"]),
    ("lines", {"count": 2}, ["a\nb", "a\n\nb"], ["a b", "a\nb\nc"]),
    ("lower_case", {}, ["so it is, 3 times.", "ça va"], ["So it is.", "ÉTÉ", "123", "日本"]),
    ("upper_case", {}, ["WE WON!", "ÉTÉ 24", "**WE**"], ["We won", "WE WON it", "123", "日本"]),
    (
        "language",
        {"language": "French"},
        ["J'aime la mer et le soleil.", "Oui, c'est une bonne idée pour les vacances."],
        ["I like the sea and the sun.", "Me gusta el sol y la playa.", "Bonjour", "Ich mag es."],
    ),
    (
        "language",
        {"language": "German"},
        ["Ein Lehrer hilft den Kindern und erklärt die Welt."],
        ["A teacher helps the children.", "Un maestro ayuda a los niños.", "Lehrer"],
    ),
    (
        "language",
        {"language": "Spanish"},
        ["Es un lugar con muchos libros para todos."],
        ["É um lugar com muitos livros para todos.", "È un posto con molti libri per tutti."],
    ),
    (
        "starts_with",
        {"phrase": "Honestly"},
        ["Honestly, it is.", '**"Honestly"**, no.', "honestly"],
        ["It is, honestly.", "Honestlyish"],
    ),
    (
        "ends_with",
        {"phrase": "home"},
        ["We go home.", '"We go **Home**!"', "home"],
        ["Home is far.", "We see Rome", "the chrome"],
    ),
    (
        "ends_with_mark",
        {"mark": "?"},
        ["Where does it hurt?", '"Where?"', "**Where?**", "どこですか？"],
        ["It hurts.", 'He may ask: "Where does it hurt?"', "Where? Here."],
    ),
    (
        "word_count",
        {"word": "river", "count": 2},
        ["The river meets a River.", "river, river"],
        ["The river.", "River river river", "The rivers and the river"],
    ),
    (
        "contains",
        {"phrases": ["piano", "Tuesday"]},
        ["On tuesday the piano came."],
        ["On Tuesday the pianos came.", "A piano."],
    ),
    ("without", {"characters": ",0"}, ["Nine lives"], ["One, two", "10", ""]),
    (
        "number",
        {},
        ["15", "**15.**", "`7`", "1,000", "3.5", "-2", "１５"],
        ["It is 15", "fifteen", "15 and 16", "15 days"],
    ),
    (
        "one_of",
        {"phrases": ["yes", "no"]},
        ["Yes.", "**no**", '"YES"'],
        ["Yes, it is.", "maybe", "yes no"],
    ),
    (
        "separated",
        {"separator": ",", "count": 3},
        ["red, dark blue, green", "Red,Blue,Green.", '"red, blue, green"', "红，蓝，绿"],
        [
            "red, blue",
            "red\nblue\ngreen",
            "red, , green",
            "Well, the ones that I like are red, blue",
        ],
    ),
    (
        "json_object",
        {"keys": ["name", "age"]},
        [
            '{"age": 3, "name": "Al"}',
            '```json\n{"name": "Al", "age": 3}\n```',
            '{"name":1,"age":2}\n```',
        ],
        [
            '{"name": "Al"}',
            '{"name": 1, "age": 2, "x": 3}',
            '["name", "age"]',
            "{name: Al}",
            "[" * 9999,
        ],
    ),
    (
        "equals",
        {"phrase": "The ship left."},
        ["The ship left.", '"The ship left."', "```\nThe ship left.\n```"],
        ["The ship left", "the ship left.", "Sure: The ship left."],
    ),
    (
        "quoted",
        {},
        ['"So be it."', "“So be it.”", "« Oui. »"],
        ["So be it.", '"So" be "it"', '"So'],
    ),
    (
        "heading",
        {},
        ["# Rome\n\nIt is old.", "### Rome\nIt is old."],
        ["**Rome**\n\nIt is old.", "#Rome\nIt is old.", "# Rome", "It is\n# Rome"],
    ),
    (
        "bold_words",
        {"count": 1},
        ["We play **football**.", "__We__ play."],
        ["We play.", "**We play.**", "**We** play **on**.", "2 ** 3 ** 4"],
    ),
]


@pytest.mark.parametrize(("kind", "parameters", "good", "bad"), CASES)
def test_each_rule_by_hand(
    kind: str, parameters: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """As a reader would judge them; marks of Markdown around an answer make no difference."""
    rule = parse_rule({"kind": kind, **parameters})
    assert [text for text in good if not rule.is_followed(Answer(text, STOP, 1))] == []
    assert [text for text in bad if rule.is_followed(Answer(text, STOP, 1))] == []


def test_every_rule_has_a_case() -> None:
    """A new kind of rule comes with its own."""
    assert {case[0] for case in CASES} == KINDS.keys()


@pytest.mark.parametrize(
    ("rule", "text", "is_followed"),
    [
        ({"kind": "sentences", "count": 1}, "It was only one sentence until", False),
        ({"kind": "bullets", "count": 1}, "- and more may", False),
        ({"kind": "lower_case"}, "all of it so far is in", True),
        ({"kind": "starts_with", "phrase": "So"}, "So it went on and", True),
    ],
)
def test_what_an_answer_that_was_cut_off_shows(rule: Any, text: str, is_followed: bool) -> None:
    """How it begins and what it is like throughout, but not how many parts it has."""
    assert parse_rule(rule).is_followed(Answer(text, LENGTH, 9)) == is_followed


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("**a**", "a"),
        ('**"a b"**', "a b"),
        ("```json\n{}\n```", "{}"),
        ("“a”", "a"),
        ("**a** and **b**", "**a** and **b**"),
        ('"a" and "b"', '"a" and "b"'),
        ("**", "**"),
        ("", ""),
    ],
)
def test_only_marks_around_the_whole_are_unwrapped(text: str, inner: str) -> None:
    """Marks within a text belong to it."""
    assert unwrap(text) == inner


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, '"rule.kind" must be text, not null'),
        ({"kind": "rhymes"}, '"rule.kind" is not one of words, '),
        ({"kind": ["words"]}, '"rule.kind" must be text, not list'),
        ({"kind": "bullets"}, 'the rule "bullets" takes the keys kind, count'),
        (
            {"kind": "bullets", "count": 1, "most": 2},
            'the rule "bullets" takes the keys kind, count',
        ),
        ({"kind": "bullets", "count": "3"}, '"rule.count" must be a whole number, not text'),
        ({"kind": "bullets", "count": -1}, '"rule.count" is not between 0 and '),
        ({"kind": "language", "language": "Klingon"}, '"rule.language" is not one of English, '),
        ({"kind": "separated", "separator": "", "count": 2}, '"rule.separator" is empty'),
        ({"kind": "contains", "phrases": []}, '"rule.phrases" is empty'),
        ({"kind": "contains", "phrases": ["a", ""]}, '"rule.phrases" is empty'),
    ],
)
def test_a_wrong_rule_is_refused(rule: dict[str, Any], message: str) -> None:
    """Before any model is asked: a rule that holds by mistake would hide a loss."""
    with pytest.raises(ValueError) as error:
        parse_rule(rule)
    assert str(error.value).startswith(message)


# The tasks --------------------------------------------------------------------------------------


def test_the_shipped_tasks() -> None:
    """As many as the README says, no two alike, rules of many kinds, right answers everywhere."""
    tasks = cost.load()
    texts = [
        *tasks.prompts,
        *(instruction.prompt for instruction in tasks.instructions),
        *(choice.question for choice in tasks.choices),
    ]
    assert (len(tasks.prompts), len(tasks.instructions), len(tasks.choices)) == (50, 40, 60)
    assert len({text.casefold() for text in texts}) == 150 and all(map(str.strip, texts))
    assert len({id(instruction.rule.kind) for instruction in tasks.instructions}) >= 15
    assert Counter(choice.right for choice in tasks.choices) == dict.fromkeys(range(4), 15)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("prompts", {"text": "Why?"}, 'lacks "prompt"'),
        ("prompts", {"prompt": 3}, '"prompt" must be text'),
        ("prompts", {"prompt": " "}, '"prompt" is empty'),
        ("instructions", {"prompt": "Why?"}, 'lacks "rule"'),
        ("instructions", {"prompt": "Why?", "rule": "words"}, '"rule" must be an object'),
        (
            "instructions",
            {"prompt": "Why?", "rule": {"kind": "rhymes"}},
            '"rule.kind" is not one of',
        ),
        (
            "choices",
            {"question": "Why?", "options": ["a", "b", "c"], "right": 0},
            '"options" must be 4',
        ),
        ("choices", {"question": "Why?", "options": [*"abca"], "right": 0}, '"options" must be 4'),
        ("choices", {"question": "Why?", "options": [*"abc "], "right": 0}, '"options" must be 4'),
        ("choices", {"question": "", "options": [*"abcd"], "right": 0}, '"question" is empty'),
        (
            "choices",
            {"question": "Why?", "options": [*"abcda"], "right": 0},
            '"options" must be 4',
        ),
        (
            "choices",
            {"question": "Why?", "options": [*"abcd"], "right": 4},
            '"right" is not between',
        ),
        (
            "choices",
            {"question": "Why?", "options": [*"abcd"], "right": True},
            '"right" must be a whole',
        ),
        (
            "choices",
            {"question": "Why?", "options": [*"abcd"], "right": 0, "x": 1},
            "has the unknown key",
        ),
    ],
)
def test_a_damaged_file_is_one_line(name: str, row: Any, message: str, tmp_path: Path) -> None:
    """It names the file and the line, and says what to do."""
    folder = tmp_path / "cost"
    shutil.copytree(cost.FOLDER, folder)
    path = folder / f"{name}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    last = len(path.read_text().splitlines())
    with pytest.raises(UserError) as error:
        cost.load(folder=folder)
    assert str(error.value).startswith(f"{path}:{last}: {message}")
    assert str(error.value).endswith(cost.REMEDY) and "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """As when somebody cleared the data folder."""
    with pytest.raises(UserError, match=r"prompts.jsonl: no such file; put back"):
        cost.load(folder=tmp_path)


# The divergence ---------------------------------------------------------------------------------


def answer_of(length: int) -> EncodedAnswer:
    return EncodedAnswer(tuple(range(length + 1)), 1)


def test_divergence_by_hand() -> None:
    """Two answers of 2 and 4 tokens that lost 1 nat each: r = 2/6, residuals 1/3 and -1/3, so
    SE^2 = (2/9) / (2 * 1 * 3^2) = 1/81.
    """
    result = divergence([answer_of(2), answer_of(4)], [-3.0, -5.0], [-4.0, -6.0])
    assert result == pytest.approx(
        {"value": 1 / 3, "low": 1 / 3 - 1.96 / 9, "high": 1 / 3 + 1.96 / 9}
    )


def test_equal_models_do_not_diverge() -> None:
    """Whatever the answers are."""
    values = [-3.0, -50.0, 0.0]
    answers = [answer_of(length) for length in (1, 7, 3)]
    assert divergence(answers, values, values) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_interval_holds_the_true_value_in_95_of_100_samples() -> None:
    """300 samples of 50 answers that differ in length and in their divergence (5 SE of 300)."""
    rng, truth, hits = np.random.default_rng(0), 0.1, 0
    for _ in range(300):
        lengths = rng.integers(1, 65, size=50)
        nats = truth * lengths + 0.5 * np.sqrt(lengths) * rng.standard_normal(50)
        result = divergence([answer_of(length) for length in lengths], list(nats), [0.0] * 50)
        hits += result["low"] < truth < result["high"]
    assert 300 * 0.95 - hits == pytest.approx(0, abs=5 * np.sqrt(300 * 0.95 * 0.05))


def test_answers_are_drawn_from_the_models_own_distribution() -> None:
    """Neither sharpened nor cut: 40,000 draws within 5 standard errors."""
    probs = np.array([0.6, 0.3, 0.09, 0.01])
    mx.random.seed(0)
    draw = sampler(cost.SETTINGS.temperature, cost.SETTINGS.top_p)
    tokens = draw(mx.repeat(mx.log(mx.array(probs))[None], 40_000, axis=0))
    shares = np.bincount(np.array(tokens), minlength=4) / 40_000
    assert (np.abs(shares - probs) < 5 * np.sqrt(probs * (1 - probs) / 40_000)).all()


@pytest.fixture(params=["llama", "granite"])
def tuned(request: pytest.FixtureRequest) -> tuple[Worker, Encoder]:
    """A tiny model whose adapters change what it says."""
    loaded = load_model(str(request.getfixturevalue(request.param)))
    mx.random.seed(0)
    attach_lora(loaded.model, LoraConfig(rank=4))
    size = 0.02 if request.param == "llama" else 0.5
    for module in loaded.model.modules():
        if isinstance(module, LORA_LAYERS):
            module.lora_b = size * mx.random.normal(module.lora_b.shape)
    return Worker(loaded.model, loaded.tokenizer), Encoder(loaded.tokenizer)


def exact_divergences(worker: Worker, answer: EncodedAnswer) -> np.ndarray:
    """KL(base || tuned) over the whole vocabulary before each token of an answer."""

    def distributions() -> np.ndarray:
        logits = worker.model(mx.array([answer.ids[:-1]]))[0, answer.prompt_length - 1 :]
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), dtype=np.float64)

    with adapters_off(worker.model):
        base = distributions()
    return (np.exp(base) * (base - distributions())).sum(axis=-1)


def test_the_estimate_is_the_exact_divergence(tuned: Any) -> None:
    """On the same answers the sum over the vocabulary needs no luck. Both agree within 3
    standard errors, and are far from 0.
    """
    worker, encoder = tuned
    prompts = [f"Why {number}?" for number in range(60)]
    answers = cost.base_answers(worker, encoder, prompts, 30, seed=1, without_adapters=True)
    base = worker.log_probs(answers, without_adapters=True)
    result = divergence(answers, base, worker.log_probs(answers))
    exact = np.concatenate([exact_divergences(worker, answer) for answer in answers]).mean()
    error = (result["high"] - result["low"]) / (2 * cost.Z_95)
    assert abs(result["value"] - exact) < 3 * error < exact / 2


def test_the_answers_are_the_sampled_ids(tuned: Any) -> None:
    """The ids whose text `answers` gives, after the prompt, with the stop token only if the answer
    ended by itself.
    """
    worker, encoder = tuned
    prompts = [encoder.prompt_ids(f"Why {number}?") for number in range(8)]
    all_batches = batches(prompts, 4, seed=0)
    sequences = [s for batch in worker.sequences(all_batches, cost.SETTINGS) for s in batch]
    answers = [a for batch in worker.answers(all_batches, cost.SETTINGS) for a in batch]
    assert {answer.finish for answer in answers} == {STOP, LENGTH}
    for prompt, sequence, answer in zip(prompts, sequences, answers, strict=True):
        ids = list(sequence.ids[sequence.prompt_length :])
        assert list(sequence.ids[: sequence.prompt_length]) == prompt
        ended = [i for i in ids if i in worker.tokenizer.eos_token_ids]
        assert ended == (ids[-1:] if answer.finish == STOP else [])
        text = worker.tokenizer.decode(ids[: answer.tokens]).rstrip("\ufffd").strip()
        assert (text, answer.tokens + len(ended)) == (answer.text, len(ids))


# Multiple choice --------------------------------------------------------------------------------


def test_an_options_mean_is_its_log_prob_per_token(tuned: Any) -> None:
    """As the scorer computes it one at a time: what is read once and the padding change nothing."""
    worker, encoder = tuned
    rows = [
        Choice("Which one?", ["a", "a longer one", "é", "two words"], 0),
        Choice("Who was it?", ["nobody at all", "he", "x", "she"], 0),
    ]
    sequences = [encoder.encode(row.question, text, LENGTH) for row in rows for text in row.options]
    expected = [
        value / sequence.answer_length
        for value, sequence in zip(worker.log_probs(sequences), sequences, strict=True)
    ]
    for count in (1, 2):  # a single question shares its whole prompt with itself
        means = option_means(worker.model, encoder, rows[:count])
        assert np.ravel(means) == pytest.approx(np.array(expected[: 4 * count]), rel=1e-4)


@pytest.mark.parametrize(
    ("means", "right", "expected"),
    [
        ([-1.0, -2.0, -3.0, -4.0], 0, True),
        ([-1.0, -2.0, -3.0, -4.0], 1, False),
        ([-4.0, -3.0, -2.0, -1.0], 3, True),
        ([-1.0, -1.0, -3.0, -4.0], 0, False),  # a tie is no answer
        ([float("nan"), -2.0, -3.0, -4.0], 0, False),
        ([-1.0, float("nan"), -3.0, -4.0], 0, False),
    ],
)
def test_the_right_answer_must_be_alone_at_the_top(means: Any, right: int, expected: bool) -> None:
    """A model that has broken down and finds everything alike knows nothing."""
    assert picks_right(means, right) == expected


def test_choices_by_hand(tuned: Any, monkeypatch: Any) -> None:
    """One of two questions is answered right."""
    worker, encoder = tuned
    rows = [Choice("One?", [*"abcd"], 2), Choice("Two?", [*"efgh"], 2)]
    means = [[-3.0, -2.0, -1.0, -4.0], [-1.0, -2.0, -3.0, -4.0]]
    monkeypatch.setattr(choices, "option_means", lambda *_: means)
    assert check_choices(worker.model, encoder, rows) == [True, False]


# Together ---------------------------------------------------------------------------------------


def test_a_comparison_by_hand() -> None:
    """Three of four against two of four, of which one is new."""
    base = ModelResults([-3.0, -5.0], [True, True, True, False], [True, False])
    tuned = ModelResults([-4.0, -6.0], [True, False, False, True], [True, False])
    result = compare([answer_of(2), answer_of(4)], base, tuned)
    assert result["divergence"]["value"] == pytest.approx(1 / 3)
    change = result["instructions"].pop("change")  # type: ignore[misc]
    assert change["value"] == -0.25 and change["low"] < -0.25 < change["high"]
    assert result["instructions"] == {
        "base": 0.75,
        "tuned": 0.5,
        "tasks": 4,
        "lost": 2,
        "gained": 1,
    }
    none = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result["choices"] == {
        "base": 0.5,
        "tuned": 0.5,
        "tasks": 2,
        "lost": 0,
        "gained": 0,
        "change": none,
    }


def test_a_model_compared_with_itself_cost_nothing(llama: Path) -> None:
    """Loaded twice, as stage 12 loads the base and the tuned model one after the other."""
    tasks = cost.load()
    tasks = cost.Tasks(tasks.prompts[:3], tasks.instructions[:3], tasks.choices[:3])
    answers: list[EncodedAnswer] = []
    results = []
    for _ in range(2):
        loaded = load_model(str(llama))
        worker, encoder = Worker(loaded.model, loaded.tokenizer), Encoder(loaded.tokenizer)
        answers = answers or cost.base_answers(worker, encoder, tasks.prompts, 2, seed=0)
        results.append(cost.measure(worker, encoder, tasks, answers, 2))
    result = compare(answers, *results)
    assert result["divergence"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [result[name]["tasks"] for name in ("instructions", "choices")] == [3, 3]
    assert [result[name]["lost"] for name in ("instructions", "choices")] == [0, 0]
