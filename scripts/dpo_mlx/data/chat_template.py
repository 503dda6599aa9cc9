"""A model's chat template, with the system message and the template arguments of a run.

We learn what a template does by rendering sample messages. We never parse its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from types import SimpleNamespace
from typing import Any, cast

from transformers.utils import chat_template_utils

from ..config import Scalar
from ..files.errors import UserError
from ..files.text import reason
from ..process.time_limit import cpu_limit

# Sample messages. No template contains these texts.
QUESTION, ANSWER, SYSTEM = "The question?", "The answer.", "The system message."
# Long enough that a template with a length limit would cut it.
LONG_QUESTION = f"{QUESTION} {'And why? ' * 500}That is all."
# CPU seconds for one rendering. It takes about 0.001, and 0.1 when the template is compiled first.
RENDER_SECONDS = 2.0
# Characters that a template can add to the messages.
MARKUP_LIMIT = 1_000_000
# Characters of a rendered text that an error shows.
SHOWN = 120
# Number of times one question is rendered, to detect a random template.
RENDERINGS = 16
# The tags of a thinking block, when the tokenizer does not name its own.
THINKING_TAGS = ("<think>", "</think>")
# Two dates this far apart have another weekday, day, month and year.
OTHER_DATE = timedelta(days=400)
REMEDY = "correct chat_template in the model's folder, or use another model"
_MARK = re.compile(r"[<\[][^\s<>\[\]]+[>\]]")
WITHOUT_THINKING: dict[str, Scalar] = {"enable_thinking": False}

Message = dict[str, str]
Arguments = Mapping[str, Scalar]


class RenderError(UserError):
    """The template fails on these messages or arguments. `cause` is the template's error."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"model: its chat template fails ({cause}); {REMEDY}")
        self.cause = cause


class ChatTemplate:
    """A model's chat template with the system message and the template arguments of a run.

    Templates can ask for the time. They always get the start of `day`, so that a run can stop and
    go on the next day with the same prompts.

    Raises UserError when the tokenizer has no chat template, when the template rejects the system
    message or the arguments, when a prompt lacks the question or is random, when a prompt ends
    inside a thinking block, and when only enable_thinking: false closes it.
    """

    def __init__(
        self, tokenizer: Any, system_prompt: str, arguments: Arguments, day: date | None = None
    ) -> None:
        _require_template(tokenizer)
        self._tokenizer = tokenizer
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._arguments = dict(arguments)
        self.day = day or date.today()
        self._require_valid_arguments()
        self._require_whole_messages()
        self._require_same_prompt()
        self._refuse_open_thinking()
        self._strips_answers = self._conversation(f" {ANSWER}\n") == self._conversation(ANSWER)
        self._only_in_prompt, added = self._differences(self._arguments)
        # Markup, such as an empty thinking block, is part of the prompt. A blank is not, because
        # the model writes it: most tokenizers join it with the answer's first word.
        self._block, self._blank = (added, "") if added.strip() else ("", added)
        self._refuse_block_with_switch()

    def render(self, question: str) -> str:
        """Render the prompt, up to where the answer begins.

        When the template writes an empty thinking block or a header before every answer, but does
        not end its prompts with it, then this adds it.
        """
        return self._prompt(self._system, self._arguments, question) + self._block

    def answer(self, text: str) -> str:
        """An answer as the template writes it after the prompt, without the end of turn."""
        return self._blank + (text.strip() if self._strips_answers else text)

    def after_answer(self) -> str:
        """The text after an answer: the end-of-turn token and what the template adds to it."""
        return self._conversation(ANSWER).rpartition(ANSWER)[2]

    def before_answer(self) -> str:
        """The text between a question and its answer."""
        return self.render(QUESTION).rpartition(QUESTION)[2]

    def marks(self) -> set[str]:
        """The markup between a question and its answer, such as [/INST], that text must not
        contain. Not all of it is special tokens.
        """
        return {*_MARK.findall(self.before_answer())} - {*self._thinking_tags()}

    def require_same_turns(self, question: str, answer: str) -> None:
        """Raises UserError when the template writes a question with its answer in another way than
        `render`, `answer` and `after_answer` together.
        """
        messages = [*self._system, _message("user", question), _message("assistant", answer)]
        turns = self._render(messages, self._arguments)
        prompt = self.render(question).removesuffix(self._only_in_prompt)
        if turns == prompt + self.answer(answer) + self.after_answer():
            return
        if answer.strip() not in turns:
            raise UserError(
                "the model's chat template drops or changes part of this answer (it writes "
                f"{_end(turns)}); remove that part, such as a thinking block, from the answer"
            )
        raise UserError(
            "the model's chat template does not write a prompt and its answer as it writes the two "
            f"together (a prompt ends with {_end(prompt)}, but both together are {_end(turns)}); "
            f"{REMEDY}"
        )

    def writes_date(self) -> bool:
        """Whether prompts contain the date."""
        day, prompt = self.day, self.render(QUESTION)
        self.day = day + OTHER_DATE
        try:
            return self.render(QUESTION) != prompt
        finally:
            self.day = day

    def system_message(self) -> str | None:
        """The system message of every prompt: the run's, or the template's default. None without a
        system message.
        """
        try:
            sample = self._prompt([_message("system", SYSTEM)], self._arguments)
        except RenderError:
            return None
        prefix, marker, suffix = sample.partition(SYSTEM)
        prompt = self._prompt(self._system, self._arguments)
        message = prompt[len(prefix) : len(prompt) - len(suffix)]
        if not marker or prefix + message + suffix != prompt:
            return None
        return message or None

    def notes(self) -> Iterator[str]:
        """Yield warnings about this template and its arguments."""
        if without_effect := [name for name in self._arguments if self._has_no_effect(name)]:
            names = ", ".join(without_effect)
            yield f"chat_template_args: {names}: no effect on this model's prompts; remove them"
        if self._may_think():
            yield (
                "this model may think before it answers, and the rejected answers would contain "
                "its thoughts; set chat_template_args: {enable_thinking: false}"
            )
        if self._block:
            yield (
                f"the model's chat template writes {_end(self._block)} before an answer, but not "
                "at the end of a prompt; here it is part of the prompt"
            )

    def _render(self, messages: list[Message], arguments: Arguments, **call: Any) -> str:
        """Raises RenderError when the template fails, takes too long or adds too much text."""
        try:
            with cpu_limit(RENDER_SECONDS), _clock_at(self.day):
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, **arguments, **call
                )
                text.encode()  # fails on half a surrogate pair, which the tokenizer would accept
        except Exception as error:  # a template is a program and can fail in any way
            raise RenderError(reason(error)) from error
        added = len(text) - sum(len(message["content"]) for message in messages)
        if added > MARKUP_LIMIT:
            raise RenderError(f"it adds {added} characters to a message")
        return text

    def _prompt(self, system: list[Message], arguments: Arguments, question: str = QUESTION) -> str:
        messages = [*system, _message("user", question)]
        return self._render(messages, arguments, add_generation_prompt=True)

    def _conversation(self, answer: str, arguments: Arguments | None = None) -> str:
        """The sample question with an answer."""
        messages = [_message("user", QUESTION), _message("assistant", answer)]
        return self._render(messages, self._arguments if arguments is None else arguments)

    def _differences(self, arguments: Arguments) -> tuple[str, str]:
        """(what only a prompt has after the question, what only an answered question has there).

        At most one of the two is not empty. A thinking block is all that a prompt may have alone:
        many templates drop it from earlier turns. When the two differ in another way, both are
        empty, and `require_same_turns` fails.
        """
        prompt = self._prompt([], arguments)
        answered = self._conversation(ANSWER, arguments).rpartition(ANSWER)[0]
        only_in_prompt = prompt.removeprefix(answered) if prompt.startswith(answered) else ""
        if self._thinking_tags()[1] not in only_in_prompt:
            only_in_prompt = ""
        return only_in_prompt, answered.removeprefix(prompt) if answered.startswith(prompt) else ""

    def _renders(self, system: list[Message], arguments: Arguments) -> bool:
        try:
            self._prompt(system, arguments)
        except RenderError:
            return False
        return True

    def _require_valid_arguments(self) -> None:
        """Raises UserError that names the wrong key when the template cannot render a prompt."""
        try:
            self._prompt(self._system, self._arguments)
        except RenderError as error:
            raise UserError(self._explain(error.cause)) from error

    def _require_whole_messages(self) -> None:
        """Raises UserError when the template drops the question, part of it, or the answer."""
        if LONG_QUESTION not in self._prompt(self._system, self._arguments, LONG_QUESTION):
            raise UserError(f"model: its chat template drops or shortens the question; {REMEDY}")
        if ANSWER not in self._conversation(ANSWER):
            raise UserError(f"model: its chat template drops the answer; {REMEDY}")

    def _require_same_prompt(self) -> None:
        """Raises UserError when the template is random."""
        if len({self._prompt(self._system, self._arguments) for _ in range(RENDERINGS)}) > 1:
            raise UserError(
                "model: its chat template renders the same question differently each time, so a "
                f"run could not be repeated; {REMEDY}"
            )

    def _explain(self, cause: str) -> str:
        """The error line for a template that cannot render a prompt."""
        if self._system and self._renders([], self._arguments):
            return f'system_prompt: the model\'s chat template rejects it ({cause}); set it to ""'
        if self._arguments and self._renders(self._system, {}):
            return (
                f"chat_template_args: the model's chat template fails with them ({cause}); "
                "correct or remove them"
            )
        return str(RenderError(cause))

    def _refuse_open_thinking(self) -> None:
        """Raises UserError when a prompt ends inside a thinking block, because training would then
        teach the answers as thoughts.
        """
        if not self._opens_thinking(self._arguments):
            return
        thinking_off = {**self._arguments, **WITHOUT_THINKING}
        if self._renders(self._system, thinking_off) and not self._opens_thinking(thinking_off):
            remedy = "set chat_template_args: {enable_thinking: false}"
        else:
            remedy = "use another model (enable_thinking: false does not change this)"
        raise UserError(
            "model: its chat template opens a thinking block before the answer, so training would "
            f"teach your answers as thoughts; {remedy}"
        )

    def _refuse_block_with_switch(self) -> None:
        """Raises UserError when enable_thinking: false makes prompts end with the thinking block
        that the template writes before answers.
        """
        thinking_off = {**self._arguments, **WITHOUT_THINKING}
        if (
            self._thinking_tags()[1] in self._block
            and self._renders([], thinking_off)
            and not self._differences(thinking_off)[1].strip()
        ):
            raise UserError(
                "model: its chat template writes an empty thinking block before an answer, but not "
                "at the end of a prompt; set chat_template_args: {enable_thinking: false}"
            )

    def _opens_thinking(self, arguments: Arguments) -> bool:
        start, end = self._thinking_tags()
        tail = self._generation_prompt(arguments)
        return tail.rfind(start) > tail.rfind(end)

    def _may_think(self) -> bool:
        """Whether a prompt has a closed thinking block only when enable_thinking is false."""
        _, end = self._thinking_tags()
        thinking_off = {**self._arguments, **WITHOUT_THINKING}
        return (
            end not in self._generation_prompt(self._arguments)
            and self._renders(self._system, thinking_off)
            and end in self._generation_prompt(thinking_off)
        )

    def _generation_prompt(self, arguments: Arguments) -> str:
        """The prompt's text after the question."""
        return self._prompt(self._system, arguments).rpartition(QUESTION)[2]

    def _thinking_tags(self) -> tuple[str, str]:
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        return (start, end) if start and end else THINKING_TAGS

    def _has_no_effect(self, name: str) -> bool:
        """Whether the prompt and the end of turn are the same without this argument."""
        others = {key: value for key, value in self._arguments.items() if key != name}
        return (
            self._renders(self._system, others)
            and self._prompt(self._system, others) == self._prompt(self._system, self._arguments)
            and self._conversation(ANSWER, others) == self._conversation(ANSWER)
        )


@contextmanager
def _clock_at(day: date) -> Iterator[None]:
    """Give templates the start of `day` as the time, instead of the clock's.

    transformers makes `strftime_now` itself, and passes no function to a template.
    """
    start, module = datetime.combine(day, time.min), cast("Any", chat_template_utils)
    clock, module.datetime = module.datetime, SimpleNamespace(now=lambda: start)
    try:
        yield
    finally:
        module.datetime = clock


def _require_template(tokenizer: Any) -> None:
    if not tokenizer.has_chat_template:
        raise UserError("model: its tokenizer has no chat template; use an instruct model")
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        names = ", ".join(templates)[:100] or "an empty list"
        raise UserError(
            f"model: none of its chat templates ({names}) is named default; rename one in the "
            "model's tokenizer_config.json, or use another model"
        )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _end(text: str) -> str:
    """The last characters of a text, for an error line."""
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])
