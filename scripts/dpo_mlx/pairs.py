"""The preference pair: its file, its token ids and the span of its answer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from . import jsonl
from .config import Config, Scalar
from .errors import UserError

# Why an answer stopped: it ended its turn by itself, or it was cut at the token limit.
STOP, LENGTH = "stop", "length"

# What a chat template is tried out with: words that no template writes by itself.
QUESTION, ANSWER, SYSTEM = "The question?", "The answer.", "The system message."
# What a chat template raises for messages or arguments that it does not take.
NOT_RENDERED = (TemplateError, TypeError, ValueError)
# The start and the end of a thinking block, where the tokenizer names no others.
THINKING = ("<think>", "</think>")
WITHOUT_THINKING: dict[str, Scalar] = {"enable_thinking": False}

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """One line of a pair file. `line` counts from 1."""

    prompt: str
    chosen: str
    rejected: str
    rejected_finish: str = STOP
    line: int = 0


@dataclass(frozen=True)
class Sequence:
    """A prompt and one answer as token ids; `ids[prompt_length:]` are the scored ones."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    def first(self, tokens: int) -> Sequence:
        """With no more than so many tokens of the answer."""
        return replace(self, ids=self.ids[: self.prompt_length + tokens])


@dataclass(frozen=True)
class EncodedPair:
    """The two sequences of a pair, and its line in the pair file."""

    chosen: Sequence
    rejected: Sequence
    line: int

    @property
    def sides(self) -> tuple[Sequence, Sequence]:
        return self.chosen, self.rejected

    @property
    def length(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.chosen.ids), len(self.rejected.ids))

    def matched(self) -> EncodedPair:
        """The pair as it is when rejected ends its turn no later than chosen does. Otherwise both
        answers without an end of turn, and rejected no longer than chosen.
        """
        ended = self.rejected.ids[-1] == self.chosen.ids[-1]
        if ended and self.rejected.answer_length <= self.chosen.answer_length:
            return self
        text = self.chosen.answer_length - 1
        return replace(self, chosen=self.chosen.first(text), rejected=self.rejected.first(text))


class Encoder:
    """Text to token ids with a model's tokenizer and chat template.

    Prompt and answer are tokenised apart and joined as ids, so that no token spans the two.
    Raises UserError when the tokenizer has no chat template, when it does not take the system
    message or the arguments, and when its prompts end in an open thinking block.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str = "",
        template_args: Mapping[str, Scalar] | None = None,
    ) -> None:
        if not tokenizer.has_chat_template:
            raise UserError("model: its tokenizer has no chat template; use an instruct model")
        self.tokenizer = tokenizer
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._arguments = dict(template_args or {})
        self._require_rendering()
        self._refuse_open_thinking()
        self.end_of_turn = self._end_of_turn()

    @classmethod
    def of(cls, tokenizer: Any, config: Config) -> Encoder:
        """With the system message and the template's arguments of a run."""
        return cls(tokenizer, config.system_prompt, config.chat_template_args)

    def prompt(self, question: str) -> list[int]:
        """Ids of the rendered question, up to where the answer begins."""
        return self.tokenizer.encode(self.rendered(question), add_special_tokens=False)

    def rendered(self, question: str) -> str:
        """The prompt as the model sees it."""
        return self._prompt(self._system, self._arguments, question)

    def system_message(self) -> str | None:
        """What stands in the system message's place in every prompt: the run's own, or what the
        chat template writes without one; None for nothing.
        """
        try:
            marked = self._prompt([_message("system", SYSTEM)], self._arguments)
        except NOT_RENDERED:
            return None
        before, marker, after = marked.partition(SYSTEM)
        text = self.rendered(QUESTION)
        inside = slice(len(before), len(text) - len(after))
        if not marker or before + text[inside] + after != text:
            return None
        return text[inside] or None

    def notes(self) -> Iterator[str]:
        """What to know of this chat template and its arguments."""
        without_effect = [name for name in self._arguments if self._has_no_effect(name)]
        if without_effect:
            names = ", ".join(without_effect)
            yield f"chat_template_args: without effect on this model's prompts: {names}"
        if not self._closes_thinking(self._arguments) and self._closes_thinking(
            {**self._arguments, **WITHOUT_THINKING}
        ):
            yield (
                "this model may think before it answers, and its thoughts become a part of the "
                "rejected answers; chat_template_args: {enable_thinking: false} keeps it from that"
            )

    def answer(self, text: str, finish: str = STOP) -> list[int]:
        """Ids of an answer, with the end of turn when the answer ended by itself."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.end_of_turn] if finish == STOP else ids

    def sequence(self, question: str, answer: str, finish: str = STOP) -> Sequence:
        prompt = self.prompt(question)
        return Sequence((*prompt, *self.answer(answer, finish)), len(prompt))

    def pair(self, pair: Pair) -> EncodedPair:
        return EncodedPair(
            self.sequence(pair.prompt, pair.chosen),
            self.sequence(pair.prompt, pair.rejected, pair.rejected_finish),
            pair.line,
        )

    def _render(self, messages: list[Message], arguments: Mapping[str, Scalar], **call: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **call)

    def _prompt(
        self, system: list[Message], arguments: Mapping[str, Scalar], question: str = QUESTION
    ) -> str:
        messages = [*system, _message("user", question)]
        return self._render(messages, arguments, add_generation_prompt=True)

    def _renders(self, system: list[Message], arguments: Mapping[str, Scalar]) -> bool:
        try:
            self._prompt(system, arguments)
        except NOT_RENDERED:
            return False
        return True

    def _require_rendering(self) -> None:
        """Raises UserError, which names the key at fault, when no prompt can be made."""
        try:
            self._prompt(self._system, self._arguments)
        except NOT_RENDERED as error:
            if self._system and self._renders([], self._arguments):
                fault = (
                    f'system_prompt: the model\'s chat template refuses it ({error}); set it to ""'
                )
            elif self._arguments and self._renders(self._system, {}):
                fault = (
                    f"chat_template_args: the model's chat template fails with them ({error}); "
                    "correct or remove them"
                )
            else:
                fault = f"model: its chat template fails ({error}); use another model"
            raise UserError(fault) from error

    def _refuse_open_thinking(self) -> None:
        """Raises UserError when a prompt ends inside a thinking block: the answers would be trained
        as the model's thoughts.
        """
        if not self._opens_thinking(self._arguments):
            return
        closed = {**self._arguments, **WITHOUT_THINKING}
        if self._renders(self._system, closed) and not self._opens_thinking(closed):
            remedy = "set chat_template_args: {enable_thinking: false}"
        else:
            remedy = "enable_thinking: false does not change that, so use another model"
        raise UserError(
            "model: its chat template opens a thinking block before the answer, so your answers "
            f"would be trained as thoughts; {remedy}"
        )

    def _opens_thinking(self, arguments: Mapping[str, Scalar]) -> bool:
        start, end = self._thinking_marks()
        tail = self._generation_prompt(arguments)
        return tail.rfind(start) > tail.rfind(end)

    def _closes_thinking(self, arguments: Mapping[str, Scalar]) -> bool:
        _, end = self._thinking_marks()
        return end in self._generation_prompt(arguments)

    def _generation_prompt(self, arguments: Mapping[str, Scalar]) -> str:
        """What stands between a question and its answer."""
        return self._prompt(self._system, arguments).rpartition(QUESTION)[2]

    def _thinking_marks(self) -> tuple[str, str]:
        start, end = (getattr(self.tokenizer, f"think_{which}", None) for which in ("start", "end"))
        return (start, end) if start and end else THINKING

    def _has_no_effect(self, name: str) -> bool:
        others = {key: value for key, value in self._arguments.items() if key != name}
        return all(
            self._render(turns, others, add_generation_prompt=is_open)
            == self._render(turns, self._arguments, add_generation_prompt=is_open)
            for turns, is_open in (
                ([*self._system, _message("user", QUESTION)], True),
                (_one_turn(), False),
            )
        )

    def _end_of_turn(self) -> int:
        """The stop token that the chat template writes after an answer."""
        text = self._render(_one_turn(), self._arguments)
        after = self.tokenizer.encode(text.rpartition(ANSWER)[2], add_special_tokens=False)
        stops = (i for i in after if i in self.tokenizer.eos_token_ids)
        return next(stops, self.tokenizer.eos_token_id)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _one_turn() -> list[Message]:
    return [_message("user", QUESTION), _message("assistant", ANSWER)]


def read(path: Path) -> list[Pair]:
    """All pairs of a file. Keys beyond the known ones are ignored.

    Raises UserError with `path:line` for a row that is no pair.
    """
    return [
        _pair(row, line, path)
        for line, row in jsonl.read(path, remedy="make it with 06_generate_dpo_pairs.py")
    ]


def _pair(row: dict[str, Any], line: int, path: Path) -> Pair:
    for key in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f'{path}:{line}: the field "{key}" must be text that is not empty')
    finish = row.get("rejected_finish", STOP)
    if finish not in (STOP, LENGTH):
        raise UserError(f'{path}:{line}: "rejected_finish" must be "{STOP}" or "{LENGTH}"')
    return Pair(row["prompt"], row["chosen"], row["rejected"], finish, line)


def encode_all(
    pairs: list[Pair], encoder: Encoder, max_length: int
) -> tuple[list[EncodedPair], list[int]]:
    """(pairs whose longer side fits `max_length` tokens, lines of those dropped)."""
    encoded = [encoder.pair(pair) for pair in pairs]
    fitting = [pair for pair in encoded if pair.length <= max_length]
    return fitting, [pair.line for pair in encoded if pair.length > max_length]


def chosen_lengths(pairs: list[Pair], encoder: Encoder) -> list[int]:
    """Of the chosen answers, in tokens with the end of turn."""
    return [len(encoder.answer(pair.chosen)) for pair in pairs]


def sequences(pairs: list[EncodedPair]) -> Iterator[Sequence]:
    """Both sides of every pair, chosen first."""
    for pair in pairs:
        yield from pair.sides


def digest(pairs: list[EncodedPair]) -> str:
    """SHA-256 of all token ids and answer spans."""
    spans = [(s.ids, s.prompt_length) for s in sequences(pairs)]
    return hashlib.sha256(repr(spans).encode()).hexdigest()
