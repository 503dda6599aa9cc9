"""The formats of a row: which fields hold the question and the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..files.text import shown
from .pairs import LENGTH, STOP
from .questions import Question, normalise

Fields = dict[str, Any]
Turn = tuple[str, str]  # (role, text)

QUESTION, ANSWER = "Question:", "Answer:"
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# A field that can hold the question -> the usual field of its answer.
ANSWERS = {"question": "answer", "prompt": "completion", "instruction": "output"}
# Fields that hold a list of messages.
CONVERSATIONS = ("messages", "conversations")
# Names of the roles in ShareGPT and in chat templates.
ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "model": ASSISTANT}
# The fields of a message: its role and its text.
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")
# How chat templates mark a turn: (before the role, after the role, after the text).
MARKUPS = (
    ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),  # Granite
    ("<|im_start|>", "\n", "<|im_end|>"),  # ChatML
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),  # Llama 3
    ("<start_of_turn>", "\n", "<end_of_turn>"),  # Gemma
)
_TURNS = [
    re.compile(
        rf"{re.escape(start)}(\w+){re.escape(role_end)}"
        rf"(.*?)(?={re.escape(end)}|{re.escape(start)}|\Z)",
        re.DOTALL,
    )
    for start, role_end, end in MARKUPS
]
_ANSWER_ON_THE_LINE = re.compile(rf"\s{ANSWER}")


@dataclass(frozen=True)
class Format:
    """How to read a row that has one of the fields `keys`. `turns` returns the row's messages;
    those of a row with `has_rejected` end with the chosen answer.
    """

    name: str
    keys: tuple[str, ...]
    turns: Callable[[Fields], list[Turn]]
    has_rejected: bool = False


def format_of(names: Iterable[str]) -> Format | None:
    """The first format that has one of these field names."""
    names = set(names)
    return next((one for one in FORMATS if names & set(one.keys)), None)


def clean_name(name: str) -> str:
    """A field's name without case, outer blanks and invisible characters such as a BOM."""
    return normalise(name).strip().casefold()


def parse(row: Fields, line: int) -> tuple[str, Question]:
    """Returns (name of the row's format, question). Raises ValueError that says what is wrong."""
    fields = {clean_name(name): value for name, value in row.items()} | row
    # Other tools write null into the columns that a row does not use.
    row_format = format_of(name for name, value in fields.items() if value is not None)
    if row_format is None:
        names = "; ".join(one.name for one in FORMATS)
        raise ValueError(
            f"the row has none of the accepted formats, found the fields {shown(list(row)[:8])}; "
            f"it needs {names}"
        )
    system, question, answer = _one_exchange(row_format.turns(fields))
    system = system or _optional(fields, "system") or _optional(fields, "system_prompt")
    if not row_format.has_rejected:
        return row_format.name, Question(question, answer, line, system)
    rejected = _rejected(fields)
    finish = fields.get("rejected_finish") or STOP
    if finish not in (STOP, LENGTH):
        raise ValueError(f'"rejected_finish" must be "{STOP}" or "{LENGTH}"')
    return row_format.name, Question(question, answer, line, system, rejected, finish)


def _one_exchange(turns: list[Turn]) -> tuple[str, str, str]:
    """Returns (system message, question, answer)."""
    system = turns[0][1] if turns and turns[0][0] == SYSTEM else ""
    roles = [role for role, _ in turns]
    if roles[bool(system) :] != [USER, ASSISTANT]:
        raise ValueError(
            f"expected one user and one assistant message, found roles {shown(roles[:5])}"
        )
    return system, turns[-2][1], turns[-1][1]


def _fields_of(question: str) -> Callable[[Fields], list[Turn]]:
    """Reads a row that has its question in this field, and its answer in one of ANSWERS."""
    usual = ANSWERS[question]

    def read(fields: Fields) -> list[Turn]:
        answer = next(
            (key for key in (usual, *ANSWERS.values(), "response") if key in fields), usual
        )
        if question == "prompt" and str(fields.get("label")).lower() == "false":  # KTO's format
            raise ValueError('"label" is false, so this is not an answer to learn from; remove it')
        if fields.get("history"):
            raise ValueError('expected one question and one answer, found "history"')
        return [*_question(fields, question), *_turns(fields, answer, ASSISTANT)]

    return read


def _question(fields: Fields, key: str) -> list[Turn]:
    """The question in a field. An instruction can have an input, which Dolly calls the context."""
    if key != "instruction":
        return _turns(fields, key, USER)
    extra = _optional(fields, "input") or _optional(fields, "context")
    return [(USER, "\n\n".join(filter(None, (_text(fields, key), extra))))]


def _text_field(fields: Fields) -> list[Turn]:
    return _from_text(_text(fields, "text"))


def _from_text(text: str) -> list[Turn]:
    for pattern in _TURNS:
        if turns := pattern.findall(text):
            return _from_messages(
                [{"role": role, "content": content} for role, content in turns], "text"
            )
    if sides := _question_and_answer(text):
        question, answer = sides
        return [
            (USER, _strip(question, "the question")),
            (ASSISTANT, _strip(answer, "the answer")),
        ]
    raise ValueError(
        'the field "text" has neither "Question: ... Answer: ..." nor the markup of a chat template'
    )


def _question_and_answer(text: str) -> tuple[str, str] | None:
    """The text after `Question:`, up to the first line that begins with `Answer:` (else up to the
    first `Answer:` after a blank), and the text after that. Not one regular expression, because
    that would backtrack over runs of blank lines.
    """
    lines = text.split("\n")
    if not lines[0].startswith(QUESTION):
        return None
    for number, line in enumerate(lines[1:], start=1):
        if line.lstrip().startswith(ANSWER):
            question = "\n".join(lines[:number]).removeprefix(QUESTION)
            answer = "\n".join([line.lstrip().removeprefix(ANSWER), *lines[number + 1 :]])
            return question, answer
    if match := _ANSWER_ON_THE_LINE.search(text):
        return text[: match.start()].removeprefix(QUESTION), text[match.end() :]
    return None


def _preference(fields: Fields) -> list[Turn]:
    """A prompt with a chosen and a rejected answer. The prompt can also be the start of both."""
    chosen = _turns(fields, "chosen", ASSISTANT)
    for key in (*ANSWERS, *CONVERSATIONS):
        if fields.get(key) is not None:
            return [*_question(fields, key), *chosen[-1:]]
    rejected = _turns(fields, "rejected", ASSISTANT)
    if len(chosen) == 1:
        raise ValueError('the field "prompt" is missing')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected do not begin with the same messages")
    return chosen


def _rejected(fields: Fields) -> str:
    """The last message of the field "rejected"."""
    turns = _turns(fields, "rejected", ASSISTANT)
    if not turns or turns[-1][0] != ASSISTANT:
        raise ValueError('"rejected" does not end with an assistant message')
    return turns[-1][1]


def _turns(fields: Fields, key: str, role: str = "") -> list[Turn]:
    """The messages in a field. With a `role`, the field can also be one text or one message."""
    value = fields.get(key)
    if role and isinstance(value, dict):
        value = [value]
    if not role or (_are_objects(value) and value):
        return _from_messages(value, key)
    return [(role, _text(fields, key))]


def _from_messages(messages: Any, key: str) -> list[Turn]:
    if not _are_objects(messages):
        raise ValueError(
            f'the field "{key}" must be a list of {{"role", "content"}} or {{"from", "value"}} '
            "objects"
        )
    return [_message(message) for message in messages]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _message(message: Fields) -> Turn:
    role = next((message[key] for key in ROLE_FIELDS if key in message), None)
    key = next((key for key in CONTENT_FIELDS if key in message), None)
    if key is None:
        raise ValueError('the field "content" of a message is missing')
    return ROLES.get(str(role), str(role)), _text({key: _joined(message[key])}, key)


def _joined(content: Any) -> Any:
    """The text of a message whose text is a list of parts."""
    if content and _are_objects(content) and all(part.get("type") == "text" for part in content):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content


def _optional(fields: Fields, key: str) -> str:
    """A field that may be missing, null or empty."""
    value = fields.get(key)
    return _text(fields, key) if value is not None and value != "" else ""


def _text(row: Fields, key: str) -> str:
    if key not in row:
        raise ValueError(f'the field "{key}" is missing')
    if not isinstance(row[key], str):
        raise ValueError(f'the field "{key}" must be text, found {type(row[key]).__name__}')
    return _strip(row[key], f'the field "{key}"')


def _strip(text: str, name: str) -> str:
    """Strip a text. Raises ValueError when nothing can be seen of it or it has a NUL character."""
    if "\0" in text:
        raise ValueError(f"{name} contains a NUL character (\\u0000); remove it")
    if not normalise(text).strip():
        raise ValueError(f"{name} is empty")
    return text.strip()


# A row has the first of these formats that applies.
FORMATS = (
    Format("prompt, chosen and rejected", ("chosen", "rejected"), _preference, has_rejected=True),
    *(Format(key, (key,), partial(_turns, key=key)) for key in CONVERSATIONS),
    Format("text", ("text",), _text_field),
    Format("question and answer", ("question", "answer"), _fields_of("question")),
    Format("prompt and completion", ("prompt", "completion"), _fields_of("prompt")),
    Format("instruction and output", ("instruction",), _fields_of("instruction")),
)
