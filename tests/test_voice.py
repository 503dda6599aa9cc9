"""The measures of voice and fluency on texts whose answer is known."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from dpo_mlx.config import GuardConfig
from dpo_mlx.voice import voice_classifier
from dpo_mlx.voice.fluency import MAX_WORDS, distinct_bigrams, longest_loop

NOUNS = ["sky", "sea", "salt", "moon", "bread", "rust", "echo", "frost", "wheel", "spring"]
VERBS = ["bends", "pulls", "warms", "keeps", "moves", "splits", "holds", "feeds"]


def sentence(draw: random.Random) -> str:
    return f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}"


def plain(draw: random.Random, sentences: int = 4) -> str:
    return ". ".join(sentence(draw).capitalize() for _ in range(sentences)) + "."


def teacher(draw: random.Random) -> str:
    first, image, end = sentence(draw), sentence(draw), plain(draw, 2)
    return f"**{first.capitalize()}.** Think of it like {image}. So, {end}"


def many(make, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [make(draw) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier() -> voice_classifier.VoiceClassifier:
    return voice_classifier.fit_classifier(many(teacher, 60, 0), many(plain, 60, 1))


def test_two_voices_are_told_apart(classifier):
    """Every text that was not used in fitting gets the right side."""
    assert classifier.accuracy(many(teacher, 60, 2), many(plain, 60, 3)) == 1.0


def test_one_voice_is_at_chance():
    """Where both sides have one voice the accuracy is at chance: the measure does not flatter."""
    classifier = voice_classifier.fit_classifier(many(plain, 60, 0), many(plain, 60, 1))
    assert 0.3 < classifier.accuracy(many(plain, 200, 2), many(plain, 200, 3)) < 0.7


def probability(classifier, texts):
    return 1 / (1 + np.exp(-classifier.log_odds(texts)))


def test_length_does_not_count(classifier):
    """A text repeated twice has the same score as the text itself."""
    texts = [*many(teacher, 10, 6), *many(plain, 10, 7)]
    once, twice = (probability(classifier, [(t + " ") * n for t in texts]) for n in (1, 2))
    np.testing.assert_allclose(once, twice, atol=0.02)


def test_fit_is_the_minimum():
    """300 steps are enough: the gradient of the penalised loss is nearly zero."""
    chosen, rejected = many(teacher, 20, 0), many(plain, 20, 1)
    fitted = voice_classifier.fit_classifier(chosen, rejected)
    x = voice_classifier.features([*chosen, *rejected])
    error = (probability(fitted, [*chosen, *rejected]) - np.repeat([1, 0], 20)) / 40
    assert np.abs(x.T @ error + voice_classifier.RIDGE * fitted.weight).max() < 1e-3
    assert abs(error.sum()) < 1e-3


def test_accuracy_weighs_both_sides_the_same():
    """Nine rejected answers do not outvote one chosen: calling all rejected gives 50%."""
    never = voice_classifier.VoiceClassifier(np.zeros(voice_classifier.FEATURES), -1.0)
    assert never.accuracy(["a"], ["b"] * 9) == 0.5


@pytest.mark.parametrize("text", ["abc", "é🙂日本", "a b " * 500, "ab"])
def test_rows_have_length_one(text):
    """A row's length does not depend on the text's."""
    assert voice_classifier.features([text]).shape == (1, voice_classifier.FEATURES)
    assert np.linalg.norm(voice_classifier.features([text])) == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["", "x"])
def test_text_without_ngrams_is_zero(text):
    """A text too short for an n-gram gives a row of zeros without a division by zero; its score is
    the bias.
    """
    assert not voice_classifier.features([text]).any()
    assert voice_classifier.VoiceClassifier(np.ones(voice_classifier.FEATURES), 0.25).log_odds(
        [text]
    ) == [0.25]


def slot(ngram: str) -> int:
    """The hash in whole numbers: a polynomial in the code points, mixed, its upper 14 bits."""
    value = len(ngram)
    for letter in ngram:
        value = (value * 0x9E3779B97F4A7C15 + ord(letter)) % 2**64
    return (value * 0xD6E8FEB86659FD93) % 2**64 >> 50


def test_features_by_hand():
    """In aaab: aa twice, ab, aaa, aab, aaab; roots of the counts, scaled to length one."""
    expected = np.zeros(voice_classifier.FEATURES)
    for ngram, count in {"aa": 2, "ab": 1, "aaa": 1, "aab": 1, "aaab": 1}.items():
        expected[slot(ngram)] = np.sqrt(count / 6)
    np.testing.assert_allclose(voice_classifier.features(["aaab"])[0], expected, atol=1e-12)


PROGRAM = """
import hashlib
from dpo_mlx.voice import voice_classifier
slots = voice_classifier.features(["abc"])[0].nonzero()[0].tolist()
print(hashlib.sha256(repr(slots).encode()).hexdigest())
"""


def test_hash_is_the_same_everywhere():
    """A report means the same on another machine: the hash has no salt, and its digest is fixed."""
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PYTHONPATH": str(REPOSITORY / "scripts"), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    slots = sorted(map(slot, ["ab", "bc", "abc"]))
    assert other.stdout.strip() == hashlib.sha256(repr(slots).encode()).hexdigest()
    assert slots == [12511, 13508, 14812]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 1.0),
        ("word", 1.0),
        ("a b c", 1.0),
        ("a a a a a", 1 / 4),  # (a, a) four times
        ("a b a b", 2 / 3),  # (a, b), (b, a), (a, b)
        ("a  b\na b", 2 / 3),  # blanks do not count
        ("hormonal " * 101, 1 / 100),
        ("好" * 201, 1 / 200),
        ("好坏" * 100, 2 / 199),
        ("天空为什么是蓝色的", 1.0),
        ("ทำไม" * 50, 4 / 199),
        ("ha" * 100, 2 / 199),
        ("😀" * 101, 1 / 100),
        ("the 天空 is blue", 1.0),
        ("a word of forty letters: " + "x" * 40, 1.0),
    ],
)
def test_distinct_bigrams_by_hand(text, share):
    """The run that collapsed scores one hundredth, ordinary text near one."""
    assert distinct_bigrams(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("a b c d", 0),
        ("hormonal hormonal hormonal", 2),
        ("x a b a b a b y", 4),
        ("a b c a b", 0),
        (" ".join([*map(str, range(MAX_WORDS))] * 2), MAX_WORDS),
        (" ".join([*map(str, range(MAX_WORDS + 1))] * 2), 0),
        ("好" * 200, 199),
        ("水はなぜ青いのか。" * 3, 18),
        ("ทำไม" * 10, 36),
        ("why?" * 100, 396),
        ("!" * 90, 89),
        ("天空为什么是蓝色的", 0),
    ],
)
def test_longest_loop_by_hand(text, words):
    """Words that only repeat the words right before them. Less than one whole repetition is not a
    loop.
    """
    assert longest_loop(text) == words


ORDINARY = {
    "Chinese": "天空之所以是蓝色的，是因为空气把蓝光散射到各个方向。"
    "傍晚阳光要穿过更厚的大气，剩下的就是红色。",
    "Japanese": "空が青いのは、空気が青い光をあらゆる方向に散らすからです。"
    "夕方には光が長い道を通り、赤だけが残ります。",
    "Thai": "ท้องฟ้าเป็นสีฟ้าเพราะอากาศกระเจิงแสงสีน้ำเงินไปทุกทิศทาง ตอนเย็นแสงต้องเดินทางไกลกว่าจึงเหลือแต่สีแดง",
    "English": "The sky is blue because air scatters blue light in all directions. In the "
    "evening the light has a longer way to go, and only the red is left.",
}


@pytest.mark.parametrize("text", ORDINARY.values(), ids=ORDINARY.keys())
def test_a_loop_trips_the_guard_in_any_script(text):
    """The guard allows a fall of 0.2. An ordinary sentence scores high, and the same sentence
    again and again falls by more than that, whether its script has blanks or not.
    """
    limit = GuardConfig().max_distinct2_drop
    assert distinct_bigrams(text) > 0.75 and longest_loop(text) == 0
    looping = text[: len(text) // 2] + text[len(text) // 2 :][:20] * 20
    assert distinct_bigrams(text) - distinct_bigrams(looping) > limit
    assert longest_loop(looping) > 50
