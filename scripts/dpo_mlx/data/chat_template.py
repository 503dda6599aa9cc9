"""A model's chat template, with the system message and the template arguments of a run.

We learn what a template does by rendering sample messages. We never parse its source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

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
# Number of times one question is rendered, to detect a random template.
RENDERINGS = 16
# The tags of a thinking block, when the tokenizer does not name its own.
THINKING_TAGS = ("<think>", "</think>")
REMEDY = "correct chat_template in the model's folder, or use another model"
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

    Raises UserError when the tokenizer has no chat template, when the template rejects the system
    message or the arguments, when a prompt lacks the question or is random, and when a prompt ends
    inside a thinking block.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, arguments: Arguments) -> None:
        _require_template(tokenizer)
        self._tokenizer = tokenizer
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._arguments = dict(arguments)
        self._require_valid_arguments()
        self._require_whole_messages()
        self._require_same_prompt()
        self._refuse_open_thinking()

    def render(self, question: str) -> str:
        """Render the prompt, up to where the answer begins."""
        return self._prompt(self._system, self._arguments, question)

    def after_answer(self) -> str:
        """The text after an answer: the end-of-turn token and what the template adds to it."""
        return self._render(_one_turn(), self._arguments).rpartition(ANSWER)[2]

    def system_message(self) -> str | None:
        """The system message of every prompt: the run's, or the template's default. None without a
        system message.
        """
        try:
            sample = self._prompt([_message("system", SYSTEM)], self._arguments)
        except RenderError:
            return None
        prefix, marker, suffix = sample.partition(SYSTEM)
        prompt = self.render(QUESTION)
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

    def _render(self, messages: list[Message], arguments: Arguments, **call: Any) -> str:
        """Raises RenderError when the template fails, takes too long or adds too much text."""
        try:
            with cpu_limit(RENDER_SECONDS):
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

    def _renders(self, system: list[Message], arguments: Arguments) -> bool:
        try:
            self._prompt(system, arguments)
        except RenderError:
            return False
        return True

    def _require_valid_arguments(self) -> None:
        """Raises UserError that names the wrong key when the template cannot render a prompt."""
        try:
            self.render(QUESTION)
        except RenderError as error:
            raise UserError(self._explain(error.cause)) from error

    def _require_whole_messages(self) -> None:
        """Raises UserError when the template drops the question, part of it, or the answer."""
        if LONG_QUESTION not in self.render(LONG_QUESTION):
            raise UserError(f"model: its chat template drops or shortens the question; {REMEDY}")
        if ANSWER not in self._render(_one_turn(), self._arguments):
            raise UserError(f"model: its chat template drops the answer; {REMEDY}")

    def _require_same_prompt(self) -> None:
        """Raises UserError when the template is random. One change is allowed, because a template
        may write the date.
        """
        prompts = [self.render(QUESTION) for _ in range(RENDERINGS)]
        if sum(one != next_one for one, next_one in pairwise(prompts)) > 1:
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
            and self._prompt(self._system, others) == self.render(QUESTION)
            and self._render(_one_turn(), others) == self._render(_one_turn(), self._arguments)
        )


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


def _one_turn() -> list[Message]:
    return [_message("user", QUESTION), _message("assistant", ANSWER)]
