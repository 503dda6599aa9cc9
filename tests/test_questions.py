"""The source formats, and the split of questions into train and valid."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from dpo_mlx.data import questions
from dpo_mlx.files.errors import UserError

QUESTION = "Why is the sky blue?\n\nSay it in one line: 1 < 2."
ANSWER = "**Scattering.** Blue bends most.\n\n  - indented\n\nAnswer: so it is.\nQuestion: no?"
SIDES = (QUESTION, ANSWER)


def granite(*turns: tuple[str, str]) -> str:
    return "".join(
        f"<|start_of_role|>{role}<|end_of_role|>{content}<|end_of_text|>\n"
        for role, content in turns
    )


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


USER, ASSISTANT, SYSTEM = ("user", QUESTION), ("assistant", ANSWER), ("system", "Be brief.")
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "question": ({"question": QUESTION, "answer": ANSWER}, ""),
    "prompt": ({"prompt": QUESTION, "completion": ANSWER}, ""),
    "messages": (messages(USER, ASSISTANT), ""),
    "messages with system": (messages(SYSTEM, USER, ASSISTANT), "Be brief."),
    "text": ({"text": f"Question: {QUESTION}\nAnswer: {ANSWER}"}, ""),
    "text, tight": ({"text": f"Question:{QUESTION}\nAnswer:{ANSWER}"}, ""),
    "text, airy": ({"text": f"\n Question:\n{QUESTION}\n\n \nAnswer:\n\n{ANSWER}\n"}, ""),
    "granite": ({"text": granite(USER, ASSISTANT)}, ""),
    "granite with system": ({"text": granite(SYSTEM, USER, ASSISTANT)}, "Be brief."),
    "granite, open end": ({"text": granite(USER, ASSISTANT).removesuffix("<|end_of_text|>\n")}, ""),
    "more keys": ({"question": QUESTION, "answer": ANSWER, "id": 7, "source": None}, ""),
    "outer blanks": ({"question": f" \n{QUESTION}\t", "answer": f"\n\n{ANSWER}  \n"}, ""),
}


def read(path: Path, *rows: Any) -> list[questions.Question]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions.read(path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same(name, tmp_path):
    """Whatever the format, question and answer come out as written, but for outer blanks."""
    row, system = FORMATS[name]
    assert read(tmp_path / "s.jsonl", row) == [questions.Question(*SIDES, 1, system)]


def test_formats_may_be_mixed_and_lines_are_counted(tmp_path):
    """All formats in one file, in its order, each with its own line."""
    path = tmp_path / "s.jsonl"
    rows = read(path, *(row for row, _ in FORMATS.values()))
    assert [(r.question, r.answer) for r in rows] == [SIDES] * len(FORMATS)
    assert [r.line for r in rows] == list(range(1, len(FORMATS) + 1))


def test_answer_keeps_inner_lines_and_blanks(tmp_path):
    """Only outer blanks go: inner blank lines, indents and trailing blanks inside stay."""
    [row] = read(tmp_path / "s.jsonl", {"text": "Question: q  \n  r \nAnswer:  a  \n\n\tb\n c \n"})
    assert (row.question, row.answer) == ("q  \n  r", "a  \n\n\tb\n c")


def test_mark_line_ends_and_blank_lines_are_fine(tmp_path):
    """A file saved on Windows gives the same questions; inner CRs of the texts are theirs."""
    path = tmp_path / "s.jsonl"
    line = json.dumps({"question": "q", "answer": "a\r\nb"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n\n" + line + b"\r\n")
    assert questions.read(path) == [
        questions.Question("q", "a\r\nb", 1),
        questions.Question("q", "a\r\nb", 4),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the row has none of the accepted formats; expected "),
        ({"input": "q", "output": "a"}, "the row has none of the accepted formats; expected "),
        ({"question": "q"}, 'the field "answer" is missing'),
        ({"answer": "a"}, 'the field "question" is missing'),
        ({"prompt": "q"}, 'the field "completion" is missing'),
        ({"question": 3, "answer": "a"}, 'the field "question" must be text, found int'),
        ({"question": "q", "answer": None}, 'the field "answer" must be text, found NoneType'),
        ({"question": "q", "answer": ["a"]}, 'the field "answer" must be text, found list'),
        ({"question": "q", "answer": ""}, 'the field "answer" is empty'),
        ({"question": " \n", "answer": "a"}, 'the field "question" is empty'),
        ({"text": ""}, 'the field "text" is empty'),
        ({"text": 1}, 'the field "text" must be text, found int'),
        ({"text": "just words"}, 'the field "text" has neither '),
        ({"text": "Question: q"}, 'the field "text" has neither '),
        ({"text": "Question: \nAnswer: a"}, "the question is empty"),
        ({"text": "Question: q\nAnswer: "}, "the answer is empty"),
        ({"text": granite(USER)}, "expected one user and one assistant message"),
        ({"text": granite(USER, ("assistant", " "))}, 'the field "content" is empty'),
        ({"messages": "hi"}, 'the field "messages" must be a list of '),
        ({"messages": ["hi"]}, 'the field "messages" must be a list of '),
        ({"messages": []}, "expected one user and one assistant message, found roles []"),
        (messages(USER, ASSISTANT, USER), "expected one user and one assistant message"),
        (messages(ASSISTANT, USER), "expected one user and one assistant message"),
        (messages(SYSTEM, SYSTEM, USER, ASSISTANT), "expected one user and one assistant message"),
        ({"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}, "expected one"),
        ({"messages": [{"role": "user"}, *messages(ASSISTANT)["messages"]]}, 'the field "content"'),
    ],
)
def test_malformed_row_is_named(row, message, tmp_path):
    """A row without question and answer stops the reading and is never skipped."""
    path = tmp_path / "s.jsonl"
    with pytest.raises(UserError) as error:
        read(path, {"question": "q", "answer": "a"}, row)
    assert str(error.value).startswith(f"{path}:2: {message}")


def made_up(count: int) -> list[str]:
    draw = random.Random(0)
    nouns = ["sky", "sea", "salt", "moon", "bread", "rust", "echo", "frost", "wheel", "spring"]
    return [f"Why does {draw.choice(nouns)} number {i} {draw.choice(nouns)}?" for i in range(count)]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_share_is_near_the_fraction(fraction):
    """2000 questions: the share held out lies within four standard errors."""
    held = sum(questions.is_held_out(question, fraction) for question in made_up(2000))
    assert abs(held / 2000 - fraction) < 4 * (fraction * (1 - fraction) / 2000) ** 0.5


def test_no_fraction_holds_nothing_out():
    """valid_fraction 0 is an empty valid split, not one question by chance."""
    assert not any(questions.is_held_out(question, 0.0) for question in made_up(2000))


def test_side_never_changes():
    """The split is the same on every machine and in every version: these sides are fixed."""
    sides = [questions.is_held_out(f"question {i}", 0.5) for i in range(16)]
    assert "".join("tv"[side] for side in sides) == "vvttvtttvttvtvvt"


def test_larger_fraction_only_adds():
    """Raising valid_fraction moves no question back into train."""
    for question in made_up(500):
        sides = [questions.is_held_out(question, fraction) for fraction in (0.1, 0.2, 0.5)]
        assert sides == sorted(sides)


@pytest.mark.parametrize(
    "copy",
    [
        "why is the sky blue",
        "WHY IS THE SKY BLUE???",
        "  Why,  is the\nsky - blue?! ",
        "“Why is the sky blue?”",
    ],
)
def test_copies_share_a_side(copy):
    """Copies that differ in case, blanks or punctuation never straddle the split."""
    for number in range(50):
        expected = questions.is_held_out(f"Why is the sky blue? {number}", 0.5)
        assert questions.is_held_out(f"{copy} {number}", 0.5) == expected
