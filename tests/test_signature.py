"""The signature: high for the author alone. Other voices, pasted habits and loops stay low.

data/answers_demo.jsonl has answers of the demo model to questions of the sample: the base model's
to the 41 train questions, and to 12 held-out ones the base model's, those after one pass of SFT
("sft") and those after two ("tuned"). The real answers are the sample's.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from dpo_mlx.voice.intervals import share_of_way
from dpo_mlx.voice.signature import Signature, find_signature
from dpo_mlx.voice.voice_classifier import fit_classifier
from lambdag import LambdaGMethod


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SAMPLE = REPOSITORY / "data/sample"
SAVED = rows(REPOSITORY / "tests/data/answers_demo.jsonl")
REAL = {row["question"]: row["answer"] for row in rows(SAMPLE / "generated_answers.jsonl")}
TRAIN = [row for row in SAVED if row["split"] == "train"]
HELD = [row for row in SAVED if row["split"] == "valid"]
AUTHOR, BASE = [REAL[row["question"]] for row in TRAIN], [row["base"] for row in TRAIN]
ANSWERS = {
    **{name: [row[name] for row in HELD] for name in ("base", "sft", "tuned")},
    "real": [REAL[row["question"]] for row in HELD],
}
OTHERS = rows(SAMPLE / "other_voices.jsonl")
VOICES = {
    voice: [row["answer"] for row in OTHERS if row["voice"] == voice]
    for voice in ("engineer", "storyteller")
}


@pytest.fixture(scope="module")
def signature() -> Signature:
    return find_signature(AUTHOR, BASE)


def way(signature: Signature, texts: Sequence[str]) -> float:
    """How far the texts are from the base model's to the author's held-out answers, in means."""
    text, base, real = (
        signature.evidence(side).mean() for side in (texts, ANSWERS["base"], ANSWERS["real"])
    )
    return float((text - base) / (real - base))


@pytest.mark.parametrize("voice", VOICES)
def test_other_voices_stay_near_the_floor(signature, voice):
    """-0.02 and 0.03 of the way were measured. The classifier of the author against the base model
    takes the same answers for the author's in part: that is why it is not the voice measure.
    """
    assert -0.1 < way(signature, VOICES[voice]) < 0.1
    fooled = 1 / (1 + np.exp(-fit_classifier(AUTHOR, BASE).log_odds(VOICES[voice])))
    assert fooled.mean() > 0.3


def test_training_moves_answers_from_the_floor_to_the_ceiling(signature):
    """base < SFT < more training < real, and each step by a clear part of the way."""
    ways = [way(signature, ANSWERS[name]) for name in ("base", "sft", "tuned", "real")]
    assert min(np.diff(ways)) > 0.1


def test_the_share_has_an_interval(signature):
    """12 questions are enough to say that one pass of SFT is neither the floor nor the ceiling."""
    sides = [signature.evidence(ANSWERS[name]) for name in ("sft", "base", "real")]
    share = share_of_way(*sides)
    assert share is not None
    assert 0.1 < share.low < share.value < share.high < 0.7


def test_an_independent_measure_ranks_the_same():
    """LambdaG (Nini et al. 2024, arXiv:2403.08462), by its authors: how much better a model of word
    pairs from the author's train answers predicts a text than one from the base model's. Its hapax
    correction (Barlow et al. 2026, arXiv:2607.09501) takes repetition out; without it, tuned
    answers are above the real ones, for a model's text is more predictable.
    """
    method = LambdaGMethod(
        basis="tokens",
        order=2,
        smoothing="kneser_ney",
        lowercasing=True,
        sentenize=True,
        num_references=1,
        calibration="hapax",
        random_seed=0,
    )
    known = "\n".join(AUTHOR[:30])  # it needs more reference sentences than known ones
    evidence = []
    for name, answers in ANSWERS.items():
        problems = [(known, "author", answer, name) for answer in answers]
        shares = method.predict_proba(problems, {"reference": BASE})[:, 1]
        evidence.append(np.log(shares / (1 - shares)).mean())
    assert np.argsort(evidence).tolist() == [0, 1, 2, 3]


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the blanks after it."""
    return re.findall(r".+?(?:[.!?*](?=\s)|$)\s*", text, re.DOTALL)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_mixture_is_where_its_share_says(signature, share):
    """The author's answers with so many of their sentences replaced by the base model's."""
    draw, mixed = random.Random(0), []
    for real, base in zip(ANSWERS["real"] * 8, ANSWERS["base"] * 8, strict=True):
        others = sentences(base)
        mixed.append(
            "".join(
                others[i % len(others)].rstrip() + " " if draw.random() < share else sentence
                for i, sentence in enumerate(sentences(real))
            )
        )
    assert way(signature, mixed) == pytest.approx(1 - share, abs=0.12)


def test_one_pasted_habit_is_a_part_of_the_way(signature):
    """The base model's answers with their first sentence in bold, as each of the author's has."""
    pasted = []
    for text in ANSWERS["base"]:
        first, *rest = sentences(text)
        pasted.append(f"**{first.strip()}**\n\n{''.join(rest)}")
    assert 0.1 < way(signature, pasted) < 0.45


@pytest.mark.parametrize(
    "text",
    ["", "x", "so the " * 100, "**" * 200, "hormonal " * 90, "So because " * 80, "。" * 300],
)
def test_degenerate_answers_are_near_the_floor(signature, text):
    """Neither nothing nor one thing again and again is a voice."""
    assert way(signature, [text]) < 0.25


def test_longer_answers_are_not_more_in_the_voice(signature):
    """Two answers in one: the base model's gain nothing, the author's lose a little."""
    twice = {name: [f"{a}\n\n{a[::-1]}" for a in ANSWERS[name]] for name in ("base", "real")}
    assert abs(way(signature, twice["base"])) < 0.15
    assert 0.6 < way(signature, twice["real"]) < 1


def test_two_halves_of_one_author_have_no_way_between_them():
    """Where author and base model write alike, nothing can be measured, and it is said."""
    texts = [*AUTHOR, *REAL.values()]
    first, second = texts[0:80:2], texts[1:80:2]
    signature = find_signature(first, second)
    held = [texts[i::3][-20:] for i in range(3)]
    assert share_of_way(*(signature.evidence(side) for side in held)) is None


@pytest.mark.parametrize(
    ("author", "base", "other"),
    [
        (
            "**{a}在{b}里。** 它在动。\n\n所以看看{b}吧。",
            "{a}在{b}里面，它在慢慢地动。",
            "从前有{a}和{b}啊！",
        ),
        (
            "{a}は{b}にあるんだよね。だから{b}を見てね。",
            "{a}は{b}にあります。",
            "昔々、{a}と{b}がいた。",
        ),
        (
            "Так вот: {a} и {b}, понимаешь?",
            "В этом случае {a} является {b}.",
            "Жили-были {a}, {b}!",
        ),
    ],
)
def test_other_scripts(author, base, other):
    """Chinese, Japanese, Cyrillic: the author's held-out texts are high, another voice's low."""
    topics, draw = "水光空石河玻铁云盐木风热冷谷叶草", random.Random(0)

    def texts(form: str, count: int) -> list[str]:
        return [form.format(a=a, b=b) for a, b in (draw.sample(topics, 2) for _ in range(count))]

    signature = find_signature(texts(author, 40), texts(base, 40))
    mine, floor, others = (signature.evidence(texts(form, 20)) for form in (author, base, other))
    share = share_of_way(others, floor, mine)
    assert share is not None and share.high < 0.25


def test_evidence_by_hand():
    """Both sides have "ab" and the start before it; "abc" is in all of the author's answers and in
    none of the base model's, as are the start with "abc", and nothing else.
    """
    signature = find_signature(["abc"] * 20, ["ab"] * 20)
    # Of the start and "abc" the n-grams of 3 or more bytes: "^ab", "abc", "^abc".
    assert signature.weights.tolist() == [1.0, 1.0] and signature.typical_count == 3
    np.testing.assert_allclose(
        signature.evidence(["abc", "ab", "xabc", ""]),
        # "xabc" has "^xa", "xab", "abc" and three longer ones.
        [2 / np.sqrt(3), 0, 1 / np.sqrt(6), 0],
    )


def test_ngrams_are_of_whole_characters():
    """A dash counts once by itself and once with each neighbour; a Chinese character as a word."""
    signature = find_signature(["a — 好的"] * 20, ["a"] * 20)
    codes = [int(code).to_bytes(8, "big").lstrip(b"\0")[1:].decode() for code in signature.ngrams]
    start = "\x02"
    expected = ["—", " —", "— ", " — ", "a —", "a — ", "好", "的", " 好", "好的", f"{start}a "]
    assert sorted(codes) == sorted([*expected, f"{start}a —"])


def test_a_difference_that_may_be_chance_does_not_count():
    """6 of 20 against none have a difference of 0.3 and a z of 2.9; with 12 of 40, 4.1."""
    few = find_signature(["abc"] * 6 + ["x"] * 14, ["x"] * 20)
    more = find_signature(["abc"] * 12 + ["x"] * 28, ["x"] * 40)
    assert len(few.ngrams) == 0 and more.weights == pytest.approx([0.09] * 3)
    assert few.evidence(["abc", ""]).tolist() == [0, 0]


@pytest.mark.parametrize(("author", "base"), [([], ["a"]), (["a"], []), ([], [])])
def test_a_side_without_answers_is_refused(author, base):
    with pytest.raises(ValueError, match="answers of the author and of the base model"):
        find_signature(author, base)


@pytest.mark.parametrize("text", ["\ud800", "\x00\x02", "😀" * 3, "a\u202eb"])
def test_any_text_can_be_scored(signature, text):
    """Half of a surrogate pair, control characters."""
    assert np.isfinite(signature.evidence([text])).all()
