"""The sources that people have: every format, and what is said of rows that cannot be used."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from dpo_mlx.data import source
from dpo_mlx.data.questions import Question
from dpo_mlx.files import text_folder
from dpo_mlx.files.errors import UserError
from dpo_mlx.files.text_folder import digest_of

QUESTION = "Why is the sky blue?\n\nSay it in one line: 1 < 2."
ANSWER = "**Scattering.** Blue bends most.\n\n  - indented\n\nAnswer: so it is.\nQuestion: no?"
SIDES = (QUESTION, ANSWER)
BRIEF = "Be brief."


# The format table of the README: what it is, and a row or a file of it. Each gives the question
# "Q?" with the answer "A.", and the rejected answer "B." if it has one.
def readme_rows() -> dict[str, str]:
    """The README's table of formats: the content of a source by the name of its format. The pieces
    of an example are its lines.
    """
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = text.partition("| format | example |\n|---|---|\n")[2].partition("\n\n")[0]
    assert table, "the README has the table"
    rows = {}
    for row in table.splitlines():
        _, name, example, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", row))
        pieces = re.findall(r"`([^`]+)`", example.replace("\\|", "|"))
        rows[name] = "\n".join(pieces)
    return rows


README_ROWS = readme_rows()


@pytest.mark.parametrize("name", README_ROWS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_row_of_the_readme(name, packed, tmp_path):
    """What the README promises can be read, also packed with gzip."""
    path = tmp_path / "source"
    content = README_ROWS[name].encode()
    if "folder" in name:
        path.mkdir()
        (path / "a.md").write_bytes(content)
    else:
        path.write_bytes(gzip.compress(content) if packed else content)
    [row] = source.read(path).questions
    assert len(README_ROWS) >= 12
    rejected = "B." if "rejected" in README_ROWS[name] else None
    assert (row.question, row.answer, row.rejected) == ("Q?", "A.", rejected)


# Rows ---------------------------------------------------------------------------------------------

Fields = dict[str, Any]


def granite(*turns: tuple[str, str]) -> str:
    return "".join(
        f"<|start_of_role|>{role}<|end_of_role|>{content}<|end_of_text|>\n"
        for role, content in turns
    )


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def llama(*turns: tuple[str, str]) -> str:
    return "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        for role, content in turns
    )


def gemma(question: str, answer: str) -> str:
    turns = (("user", question), ("model", answer))
    return "<bos>" + "".join(f"<start_of_turn>{r}\n{t}<end_of_turn>\n" for r, t in turns)


def messages(*turns: tuple[str, str]) -> list[Fields]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns: tuple[str, str]) -> list[Fields]:
    return [{"from": role, "value": content} for role, content in turns]


USER, ASSISTANT, SYSTEM = ("user", QUESTION), ("assistant", ANSWER), ("system", BRIEF)
HUMAN, GPT = ("human", QUESTION), ("gpt", ANSWER)
PARTS = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (USER, ASSISTANT)]
FORMATS: dict[str, tuple[Fields, str]] = {
    "question": ({"question": QUESTION, "answer": ANSWER}, ""),
    "prompt": ({"prompt": QUESTION, "completion": ANSWER}, ""),
    "prompt, messages": (
        {"prompt": messages(SYSTEM, USER), "completion": messages(ASSISTANT)},
        BRIEF,
    ),
    "prompt, response": ({"prompt": QUESTION, "response": ANSWER}, ""),
    "messages": ({"messages": messages(USER, ASSISTANT)}, ""),
    "messages with system": ({"messages": messages(SYSTEM, USER, ASSISTANT)}, BRIEF),
    "messages in parts": ({"messages": PARTS}, ""),
    "messages in ShareGPT's words": ({"messages": sharegpt(HUMAN, GPT)}, ""),
    "ShareGPT": ({"conversations": sharegpt(HUMAN, GPT)}, ""),
    "ShareGPT with system": ({"conversations": sharegpt(SYSTEM, HUMAN, GPT)}, BRIEF),
    "ShareGPT, system beside": ({"system": BRIEF, "conversations": sharegpt(HUMAN, GPT)}, BRIEF),
    "conversations in messages' words": ({"conversations": messages(USER, ASSISTANT)}, ""),
    "Alpaca": ({"instruction": QUESTION, "output": ANSWER}, ""),
    "Alpaca, no input": ({"instruction": QUESTION, "input": "", "output": ANSWER}, ""),
    "Alpaca, null": ({"instruction": QUESTION, "input": None, "output": ANSWER, "text": None}, ""),
    "Alpaca, input": (
        dict(zip(("instruction", "input"), QUESTION.split("\n\n"), strict=True))
        | {"output": ANSWER, "history": [], "system": BRIEF},
        BRIEF,
    ),
    "Dolly": (
        {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "open_qa"},
        "",
    ),
    "OpenOrca": ({"system_prompt": BRIEF, "question": QUESTION, "response": ANSWER}, BRIEF),
    "text": ({"text": f"Question: {QUESTION}\nAnswer: {ANSWER}"}, ""),
    "text, tight": ({"text": f"Question:{QUESTION}\nAnswer:{ANSWER}"}, ""),
    "text, airy": ({"text": f"\n Question:\n{QUESTION}\n\n \nAnswer:\n\n{ANSWER}\n"}, ""),
    "granite": ({"text": granite(USER, ASSISTANT)}, ""),
    "granite with system": ({"text": granite(SYSTEM, USER, ASSISTANT)}, BRIEF),
    "granite, open end": ({"text": granite(USER, ASSISTANT).removesuffix("<|end_of_text|>\n")}, ""),
    "ChatML": ({"text": chatml(USER, ASSISTANT)}, ""),
    "ChatML with system": ({"text": chatml(SYSTEM, USER, ASSISTANT)}, BRIEF),
    "ChatML, open end": ({"text": chatml(USER, ASSISTANT).removesuffix("<|im_end|>\n")}, ""),
    "Llama 3": ({"text": llama(USER, ASSISTANT)}, ""),
    "Gemma": ({"text": gemma(*SIDES)}, ""),
    "more keys": ({"question": QUESTION, "answer": ANSWER, "id": 7, "source": None}, ""),
    "SQuAD's context": ({"question": QUESTION, "context": "c", "answer": ANSWER}, ""),
    "BOM in the first key": ({"\ufeffquestion": QUESTION, "answer": ANSWER}, ""),
    "odd keys": ({"Question ": QUESTION, "\u200bANSWER": ANSWER}, ""),
    "outer blanks": ({"question": f" \n{QUESTION}\t", "answer": f"\n\n{ANSWER}  \n"}, ""),
}


def read(path: Path, *rows: Any) -> list[Question]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source.read(path).questions


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same(name, tmp_path):
    """Whatever the format, question and answer come out as written, but for outer blanks."""
    row, system = FORMATS[name]
    assert read(tmp_path / "s.jsonl", row) == [Question(*SIDES, 1, system)]


def test_formats_may_be_mixed_and_lines_are_counted(tmp_path):
    """All formats in one file, in its order, each with its own line."""
    path = tmp_path / "s.jsonl"
    rows = read(path, *(row for row, _ in FORMATS.values()))
    assert [(r.question, r.answer) for r in rows] == [SIDES] * len(FORMATS)
    assert [r.line for r in rows] == list(range(1, len(FORMATS) + 1))


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("Question: q  \n  r \nAnswer:  a  \n\n\tb\n c \n", ("q  \n  r", "a  \n\n\tb\n c")),
        ("Question: q? Answer: a. Answer: b.", ("q?", "a. Answer: b.")),
        ("Question: q Answer: r?\nAnswer: a", ("q Answer: r?", "a")),
        ("Question: q?\tAnswer:a\n\nb", ("q?", "a\n\nb")),
    ],
)
def test_labels_in_a_text(text, sides, tmp_path):
    """Only outer blanks go. A line that begins with the label ends the question; else the first
    label on the question's line does.
    """
    [row] = read(tmp_path / "s.jsonl", {"text": text})
    assert (row.question, row.answer) == sides


REJECTED = ("assistant", "It depends.")
PAIRS: dict[str, tuple[Fields, str]] = {
    "plain": ({"prompt": QUESTION}, ""),
    "Orca": ({"system": BRIEF, "question": QUESTION}, BRIEF),
    "instruction": (dict(zip(("instruction", "input"), QUESTION.split("\n\n"), strict=True)), ""),
    "TRL": ({"prompt": messages(USER)}, ""),
    "TRL with system": ({"prompt": messages(SYSTEM, USER)}, BRIEF),
    "ShareGPT": ({"conversations": sharegpt(HUMAN)}, ""),
}
ENDS: dict[str, tuple[Any, Any]] = {
    "text": (ANSWER, REJECTED[1]),
    "messages": (messages(ASSISTANT), messages(REJECTED)),
    "one message": (sharegpt(GPT)[0], sharegpt(("gpt", REJECTED[1]))[0]),
    "whole conversations": (messages(USER, ASSISTANT), messages(USER, REJECTED)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("end", ENDS)
def test_preference_pairs(name, end, tmp_path):
    """Pairs of other tools: the prompt in any of its fields, the answers as text or messages."""
    fields, system = PAIRS[name]
    chosen, rejected = ENDS[end]
    row = {**fields, "chosen": chosen, "rejected": rejected, "score_chosen": 1.5}
    assert read(tmp_path / "s.jsonl", row) == [Question(*SIDES, 1, system, REJECTED[1])]


def test_pairs_with_the_prompt_inside(tmp_path):
    """TRL's implicit prompt: both conversations begin with it."""
    row = {
        "chosen": messages(SYSTEM, USER, ASSISTANT),
        "rejected": messages(SYSTEM, USER, REJECTED),
    }
    assert read(tmp_path / "s.jsonl", row) == [Question(*SIDES, 1, BRIEF, REJECTED[1])]


def test_our_own_pairs_keep_how_they_ended(tmp_path):
    """An answer that was cut must not be trained on with an end of turn."""
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "rejected_finish": "length"}
    assert read(tmp_path / "s.jsonl", row) == [Question("q", "a", 1, "", "b", "length")]


# Files --------------------------------------------------------------------------------------------

ROWS = [{"question": f"Why {i}?", "answer": f'So, "{i}";\n\ttake {i}.'} for i in range(3)]
EXPECTED = [(row["question"], row["answer"]) for row in ROWS]


def table(**settings: Any) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["question", "answer"], **settings)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES: dict[str, tuple[bytes, str]] = {
    "lines": (LINES, "JSON lines"),
    "lines with commas": (LINES.replace(b"}\n", b"},\n"), "JSON objects"),
    "list": (json.dumps(ROWS).encode(), "a JSON list"),
    "indented list": (json.dumps(ROWS, indent=2).encode(), "a JSON list"),
    "list with BOM": (b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode() + b"\n\n", "a JSON list"),
    "two BOMs": (b"\xef\xbb\xbf" * 2 + LINES, "JSON lines"),
    "list, comma at the end": (json.dumps(ROWS).encode()[:-1] + b",\n]", "a JSON list"),
    "objects over lines": (
        "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        "JSON objects",
    ),
    "commas": (table(), "a table (CSV) with commas"),
    "quotes": (table(quoting=csv.QUOTE_ALL), "a table (CSV) with commas"),
    "semicolons": (table(delimiter=";"), "a table (CSV) with semicolons"),
    "tabs": (table(delimiter="\t"), "a table (CSV) with tabs"),
    "Excel": (b"\xef\xbb\xbf" + table(), "a table (CSV) with commas"),
    "upper case": (table().replace(b"question,answer", b"Question, ANSWER"), "a table (CSV)"),
    "blank lines": (table().replace(b"\nWhy 1", b"\n\n,\nWhy 1"), "a table (CSV) with commas"),
    "gzip": (gzip.compress(LINES), "JSON lines, packed with gzip"),
    "gzip of a table": (gzip.compress(table()), "a table (CSV) with commas, packed with gzip"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same(name, tmp_path):
    """Its content tells what it is, not its name, and stage 06 can say what it took it for."""
    content, kind = FILES[name]
    path = tmp_path / "s.jsonl"
    path.write_bytes(content)
    data = source.read(path)
    assert [(q.question, q.answer) for q in data.questions] == EXPECTED
    assert data.description.startswith(f"{path}: read as {kind}")
    assert data.description.endswith("; rows: 3 with question and answer")
    assert data.bad_rows == data.notes() == []


def test_mark_line_ends_and_blank_lines_are_fine(tmp_path):
    """A file saved on Windows gives the same questions; inner CRs of the texts are theirs."""
    path = tmp_path / "s.jsonl"
    line = json.dumps({"question": "q", "answer": "a\r\nb"}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n\n" + line + b"\r\n")
    assert source.read(path).questions == [Question("q", "a\r\nb", 1), Question("q", "a\r\nb", 4)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_the_line_ends_of_a_table_and_a_text_are_no_part_of_the_answer(line_end, tmp_path):
    """Those of Windows and of old Macs are those of the file, and lines are still counted."""
    lines = ["question,answer", '"q', 'r","a', "", 'b"', "q,a"]
    (tmp_path / "s.csv").write_text(line_end.join(lines), newline="")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(line_end.join(["q", "", "a", "", "b"]), newline="")
    rows = source.read(tmp_path / "s.csv").questions
    assert rows == [Question("q\nr", "a\n\nb", 2), Question("q", "a", 6)]
    assert source.read(texts).questions == [Question("q", "a\n\nb", 1)]


TEXTS: dict[str, tuple[str, tuple[str, str]]] = {
    "heading": ("# Why C#?\n\n## So\n\nIt is.\n", ("Why C#?", "## So\n\nIt is.")),
    "closed heading": ("### Why? ###\nIt is.", ("Why?", "It is.")),
    "line": ("\n\nWhy?\nIt is.\n\nSo.", ("Why?", "It is.\n\nSo.")),
    "underlined": ("Why?\n====\n\nIt is.", ("Why?", "It is.")),
    "tag": ("#why is it?\nIt is.", ("#why is it?", "It is.")),
    "settings first": ("---\ntitle: x\n---\n# Why?\nIt is.", ("Why?", "It is.")),
    "labels": ("Question: Why\nis it?\n\nAnswer: It is.", ("Why\nis it?", "It is.")),
    "BOM": ("\ufeff# Why?\nIt is.", ("Why?", "It is.")),
    "a rule": ("Why?\n\n---\n\nIt is.", ("Why?", "---\n\nIt is.")),
}


def test_a_folder_of_texts(tmp_path):
    """One question a file, in the order of their names; other files are counted, not read."""
    for number, (text, _) in enumerate(TEXTS.values()):
        suffix = text_folder.SUFFIXES[number % len(text_folder.SUFFIXES)]
        (tmp_path / f"{number}{suffix.upper()}").write_text(text)
    for other in (".DS_Store", ".hidden.md", "notes.docx"):
        (tmp_path / other).write_text("x")
    (tmp_path / "sub.md").mkdir()
    data = source.read(tmp_path)
    assert [(q.question, q.answer) for q in data.questions] == [
        sides for _, sides in TEXTS.values()
    ]
    assert (
        "a folder of text files; 4 other files and folders in it are not read" in data.description
    )


def test_stage_06_notices_a_change_in_a_folder(tmp_path):
    """A text that was added, changed or renamed changes the digest; another file does not."""
    (tmp_path / "a.md").write_text("# Q?\nA.")
    digests = [digest_of(tmp_path)]
    changes: list[Callable[[], object]] = [
        lambda: (tmp_path / "b.txt").write_text("# R?\nA."),
        lambda: (tmp_path / "a.md").write_text("# Q?\nB."),
        lambda: (tmp_path / "a.md").rename(tmp_path / "c.md"),
    ]
    for change in changes:
        change()
        digests.append(digest_of(tmp_path))
    assert len(set(digests)) == 4
    (tmp_path / ".DS_Store").write_text("x")
    assert digest_of(tmp_path) == digests[-1]


# Bad rows -----------------------------------------------------------------------------------------

GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the row has none of the accepted formats, found the fields []; it needs "),
        ({"input": "q", "output": "a"}, "the row has none of the accepted formats, found "),
        ({"text": None}, "the row has none of the accepted formats"),
        ({"question": "q"}, 'the field "answer" is missing'),
        ({"answer": "a"}, 'the field "question" is missing'),
        ({"prompt": "q"}, 'the field "completion" is missing'),
        ({"instruction": "q"}, 'the field "output" is missing'),
        ({"question": 3, "answer": "a"}, 'the field "question" must be text, found int'),
        ({"question": "q", "answer": None}, 'the field "answer" must be text, found NoneType'),
        ({"question": "q", "answer": ["a"]}, 'the field "answer" must be text, found list'),
        ({"question": "q", "answer": []}, 'the field "answer" must be text, found list'),
        ({"question": "q", "answer": ""}, 'the field "answer" is empty'),
        ({"question": "q", "answer": "\u200b \ufeff"}, 'the field "answer" is empty'),
        ({"question": " \n", "answer": "a"}, 'the field "question" is empty'),
        ({"question": "q", "answer": "a", "system": 3}, 'the field "system" must be text, found'),
        ({"prompt": "q", "completion": "a", "label": False}, '"label" is false'),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, "expected one question and"),
        ({"text": ""}, 'the field "text" is empty'),
        ({"text": 1}, 'the field "text" must be text, found int'),
        ({"text": "just words"}, 'the field "text" has neither '),
        ({"text": "Question: q"}, 'the field "text" has neither '),
        ({"text": "Question: q no Answer"}, 'the field "text" has neither '),
        ({"text": "Question: \nAnswer: a"}, "the question is empty"),
        ({"text": "Question: q\nAnswer: "}, "the answer is empty"),
        ({"text": granite(USER)}, "expected one user and one assistant message"),
        ({"text": chatml(USER)}, "expected one user and one assistant message"),
        ({"text": granite(USER, ("assistant", " "))}, 'the field "content" is empty'),
        ({"messages": "hi"}, 'the field "messages" must be a list of '),
        ({"messages": ["hi"]}, 'the field "messages" must be a list of '),
        ({"conversations": {}}, 'the field "conversations" must be a list of '),
        ({"messages": []}, "expected one user and one assistant message, found roles []"),
        ({"messages": messages(USER, ASSISTANT, USER)}, "expected one user and one assistant"),
        ({"messages": messages(ASSISTANT, USER)}, "expected one user and one assistant message"),
        ({"messages": messages(SYSTEM, SYSTEM, USER, ASSISTANT)}, "expected one user and one"),
        ({"conversations": sharegpt(HUMAN, GPT, HUMAN, GPT)}, "expected one user and one"),
        ({"messages": [{"content": "q"}, {"role": "assistant", "content": "a"}]}, "expected one"),
        ({"messages": [{"role": "user"}, *messages(ASSISTANT)]}, 'the field "content" of a '),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 'the field "content" m'),
        ({"prompt": "q", "chosen": "a"}, 'the field "rejected" is missing'),
        ({"prompt": "q", "rejected": "a"}, 'the field "chosen" is missing'),
        ({"chosen": "a", "rejected": "b"}, 'the field "prompt" is missing'),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, 'the field "rejected" is empty'),
        ({"prompt": "q", "chosen": "a", "rejected": messages(USER)}, '"rejected" does not end'),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "rejected_finish": "?"}, '"rejected_fin'),
        (
            {"chosen": messages(USER, ASSISTANT), "rejected": messages(("user", "?"), REJECTED)},
            "chosen and rejected do not begin with the same messages",
        ),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    """A row without question and answer stops the reading, with the way to go on without it."""
    path = tmp_path / "s.jsonl"
    with pytest.raises(UserError) as error:
        read(path, GOOD, row)
    assert str(error.value).startswith(f"{path}:2: {message}")
    assert str(error.value).endswith("; to go on without such rows, set data.skip_bad_rows: true")
    assert "\n" not in str(error.value)


BAD_LINES = [
    *[b'{"question": "q"}'] * 3,
    *[b'{"question": "q", "ans'] * 2,
    b'["q", "a"]',
    b'{"question": "\xe9", "answer": "a"}',
    *[json.dumps({"messages": messages(*[USER] * n)}).encode() for n in range(2, 8)],
]


def test_all_bad_rows_are_named_at_once(tmp_path):
    """The first ten with line and reason, then all of them by reason, whatever differs in it."""
    path = tmp_path / "s.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, *BAD_LINES, good]))
    with pytest.raises(UserError) as error:
        source.read(path)
    *named, last = str(error.value).splitlines()
    assert [line.split(" ")[0] for line in named] == [f"{path}:{n}:" for n in range(2, 12)]
    assert last == (
        f"{path}: 13 bad rows: 6 x expected one user and one assistant message; "
        '3 x the field "answer" is missing; 2 x broken JSON; 1 x expected a JSON object; '
        "1 x not UTF-8; to go on without such rows, set data.skip_bad_rows: true"
    )
    data = source.read(path, skip_bad_rows=True)
    assert [q.line for q in data.questions] == [1, 15]
    assert data.notes()[:-1] == named
    assert data.notes()[-1].startswith("skipped 13 bad rows: 6 x ")


def test_bad_rows_of_a_table_and_of_a_folder(tmp_path):
    """Each is named by the line it begins on, or by its file."""
    path = tmp_path / "s.csv"
    path.write_text('question,answer\n"q\nr",a\nq\nq,a,b\n,\nq,\nq,"a"b"\nq,a\n')
    data = source.read(path, skip_bad_rows=True)
    assert [q.line for q in data.questions] == [2, 9]
    assert [(row.place, row.fault[:22]) for row in data.bad_rows] == [
        (f"{path}:4", "a row with another num"),
        (f"{path}:5", "a row with another num"),
        (f"{path}:7", 'the field "answer" is '),
        (f"{path}:8", "quotes that do not fit"),
    ]
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in {
        "a.md": b"# Q?\n",
        "b.md": b"# Q?\nA.",
        "c.md": b"\xe9",
        "d.md": b"",
    }.items():
        (texts / name).write_bytes(text)
    data = source.read(texts, skip_bad_rows=True)
    assert [row.place for row in data.bad_rows] == [str(texts / f"{n}.md") for n in "acd"]


def test_bad_rows_alone_are_never_skipped(tmp_path):
    """A source of which nothing is left is a source of another kind."""
    path = tmp_path / "s.jsonl"
    path.write_text('{"q": "a"}\n' * 3)
    with pytest.raises(UserError, match="3 bad rows: 3 x the row has none of .*; no row is left"):
        source.read(path, skip_bad_rows=True)


PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\t",
    b"null",
    b"\xff",
    b"\\ud800",
]


def test_damaged_files_are_errors_of_the_user(tmp_path):
    """Whatever is inserted or lost: an error of short printable lines, and never another one."""
    draw = random.Random(0)
    path = tmp_path / "s"
    good = [content for content, _ in FILES.values()] + [
        row.encode() for row in README_ROWS.values()
    ]
    for _ in range(500):
        content = bytearray(draw.choice(good))
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(content) + 1)
            content[start : start + draw.choice([0, 0, 1, 20])] = draw.choice(PIECES)
        path.write_bytes(content)
        try:
            source.read(path, skip_bad_rows=draw.random() < 0.5)
        except UserError as error:
            lines = str(error).splitlines()
            assert len(lines) <= source.NAMED + 1
            assert all(line.isprintable() and len(line) < 1000 for line in lines)
