"""Reads questions and answers from the accepted source formats."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import jsonl
from ..files.errors import UserError
from ..files.text import shown

FORMATS = (
    '{"question", "answer"}, {"prompt", "completion"}, {"messages"}, '
    'or {"text"} with "Question: ... Answer: ..." or Granite\'s chat markup'
)
QUESTION, ANSWER = "Question:", "Answer:"
_GRANITE_TURN = re.compile(
    r"<\|start_of_role\|>(\w+)<\|end_of_role\|>(.*?)(?=<\|end_of_text\|>|<\|start_of_role\|>|\Z)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Question:
    """A question and the answer to learn, both stripped."""

    question: str
    answer: str
    line: int
    system: str = ""


def read(path: Path) -> list[Question]:
    """Read all questions of a source file, in file order.

    Raises UserError with `path:line` for a row without a question and an answer.
    """
    questions = []
    for line, row in jsonl.read(path, remedy="set data.source to your questions and answers"):
        try:
            system, question, answer = _fields(row)
        except ValueError as error:
            raise UserError(f"{shown(path)}:{line}: {error}") from error
        questions.append(Question(question, answer, line, system))
    return questions


def is_held_out(question: str, valid_fraction: float) -> bool:
    """Whether a question belongs to the valid split. This depends only on the question's words, so
    a question never changes its split.

    Questions that differ only in case, blanks or punctuation are in the same split.
    """
    digest = hashlib.sha256(words(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") < valid_fraction * 2**64


def words(question: str) -> str:
    """The question without case, blanks and punctuation, to compare questions."""
    return " ".join(re.findall(r"\w+", question.casefold()))


def _fields(row: dict[str, Any]) -> tuple[str, str, str]:
    """Returns (system, question, answer). Raises ValueError that says what is missing."""
    if "messages" in row:
        return _from_messages(row["messages"])
    if "text" in row:
        return _from_text(_text(row, "text"))
    for question, answer in (("question", "answer"), ("prompt", "completion")):
        if question in row or answer in row:
            return "", _text(row, question), _text(row, answer)
    raise ValueError(f"the row has none of the accepted formats; expected {FORMATS}")


def _from_text(text: str) -> tuple[str, str, str]:
    if turns := _GRANITE_TURN.findall(text):
        return _from_messages([{"role": role, "content": content} for role, content in turns])
    if sides := _question_and_answer(text):
        question, answer = sides
        return "", _strip(question, "the question"), _strip(answer, "the answer")
    raise ValueError(
        'the field "text" has neither "Question: ... Answer: ..." nor Granite\'s chat markup'
    )


def _question_and_answer(text: str) -> tuple[str, str] | None:
    """The text after `Question:`, up to the first line that begins with `Answer:`, and the text
    after that. Not a regular expression, because that would backtrack over runs of blank lines.
    """
    lines = text.split("\n")
    if not lines[0].startswith(QUESTION):
        return None
    for number, line in enumerate(lines[1:], start=1):
        if line.lstrip().startswith(ANSWER):
            question = "\n".join(lines[:number]).removeprefix(QUESTION)
            answer = "\n".join([line.lstrip().removeprefix(ANSWER), *lines[number + 1 :]])
            return question, answer
    return None


def _from_messages(messages: Any) -> tuple[str, str, str]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('the field "messages" must be a list of {"role", "content"} objects')
    roles = [m.get("role") for m in messages]
    system = _text(messages[0], "content") if roles[:1] == ["system"] else ""
    if roles[bool(system) :] != ["user", "assistant"]:
        raise ValueError(
            f"expected one user and one assistant message, found roles {shown(roles[:5])}"
        )
    return system, _text(messages[-2], "content"), _text(messages[-1], "content")


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f'the field "{key}" is missing')
    if not isinstance(row[key], str):
        raise ValueError(f'the field "{key}" must be text, found {type(row[key]).__name__}')
    return _strip(row[key], f'the field "{key}"')


def _strip(text: str, name: str) -> str:
    """Strip a text. Raises ValueError when it is empty or contains a NUL character."""
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL character (\\u0000); remove it")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.strip()
