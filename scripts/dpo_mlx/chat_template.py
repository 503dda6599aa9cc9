"""How a model's chat template renders a question: its system message, its arguments, its thinking.

What a template does is found by rendering, never by its words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

from .config import Scalar
from .errors import UserError

# What templates are tried out with: words that none writes by itself.
QUESTION, ANSWER, SYSTEM = "The question?", "The answer.", "The system message."
# What a template raises for messages or arguments that it does not take.
NOT_RENDERED = (TemplateError, TypeError, ValueError)
# The start and the end of a thinking block, where the tokenizer names no others.
THINKING = ("<think>", "</think>")
WITHOUT_THINKING: dict[str, Scalar] = {"enable_thinking": False}

Message = dict[str, str]
Arguments = Mapping[str, Scalar]


class ChatTemplate:
    """A model's chat template with the system message and the arguments of a run.

    Raises UserError when the tokenizer has none, when it does not take the system message or the
    arguments, and when its prompts end in an open thinking block.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, arguments: Arguments) -> None:
        if not tokenizer.has_chat_template:
            raise UserError("model: its tokenizer has no chat template; use an instruct model")
        self._tokenizer = tokenizer
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._arguments = dict(arguments)
        self._require_rendering()
        self._refuse_open_thinking()

    def rendered(self, question: str) -> str:
        """The prompt, up to where the answer begins."""
        return self._prompt(self._system, self._arguments, question)

    def after_answer(self) -> str:
        """What follows an answer: the end of turn, and what is written behind it."""
        return self._render(_one_turn(), self._arguments).rpartition(ANSWER)[2]

    def system_message(self) -> str | None:
        """What stands in the system message's place in every prompt: the run's own, or what the
        template writes without one; None for nothing.
        """
        try:
            marked = self._prompt([_message("system", SYSTEM)], self._arguments)
        except NOT_RENDERED:
            return None
        before, marker, after = marked.partition(SYSTEM)
        prompt = self.rendered(QUESTION)
        message = prompt[len(before) : len(prompt) - len(after)]
        if not marker or before + message + after != prompt:
            return None
        return message or None

    def notes(self) -> Iterator[str]:
        """What to know of this template and its arguments."""
        if without_effect := [name for name in self._arguments if self._has_no_effect(name)]:
            names = ", ".join(without_effect)
            yield f"chat_template_args: without effect on this model's prompts: {names}"
        if self._may_think():
            yield (
                "this model may think before it answers, and its thoughts would be a part of the "
                "rejected answers; set chat_template_args: {enable_thinking: false}"
            )

    def _render(self, messages: list[Message], arguments: Arguments, **call: Any) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **call)

    def _prompt(self, system: list[Message], arguments: Arguments, question: str = QUESTION) -> str:
        messages = [*system, _message("user", question)]
        return self._render(messages, arguments, add_generation_prompt=True)

    def _renders(self, system: list[Message], arguments: Arguments) -> bool:
        try:
            self._prompt(system, arguments)
        except NOT_RENDERED:
            return False
        return True

    def _require_rendering(self) -> None:
        """Raises UserError, which names the key at fault, when no prompt can be made."""
        try:
            self.rendered(QUESTION)
        except NOT_RENDERED as error:
            raise UserError(self._fault(" ".join(str(error).split()))) from error

    def _fault(self, reason: str) -> str:
        if self._system and self._renders([], self._arguments):
            return f'system_prompt: the model\'s chat template refuses it ({reason}); set it to ""'
        if self._arguments and self._renders(self._system, {}):
            return (
                f"chat_template_args: the model's chat template fails with them ({reason}); "
                "correct or remove them"
            )
        return f"model: its chat template fails ({reason}); use another model"

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

    def _opens_thinking(self, arguments: Arguments) -> bool:
        start, end = self._thinking_marks()
        tail = self._generation_prompt(arguments)
        return tail.rfind(start) > tail.rfind(end)

    def _may_think(self) -> bool:
        """Whether the template closes a thinking block only when it is told to."""
        _, end = self._thinking_marks()
        switched_off = {**self._arguments, **WITHOUT_THINKING}
        return (
            end not in self._generation_prompt(self._arguments)
            and self._renders(self._system, switched_off)
            and end in self._generation_prompt(switched_off)
        )

    def _generation_prompt(self, arguments: Arguments) -> str:
        """What stands between a question and its answer."""
        return self._prompt(self._system, arguments).rpartition(QUESTION)[2]

    def _thinking_marks(self) -> tuple[str, str]:
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        return (start, end) if start and end else THINKING

    def _has_no_effect(self, name: str) -> bool:
        """Whether prompt and end of turn are the same without this argument."""
        others = {key: value for key, value in self._arguments.items() if key != name}
        return (
            self._renders(self._system, others)
            and self._prompt(self._system, others) == self.rendered(QUESTION)
            and self._render(_one_turn(), others) == self._render(_one_turn(), self._arguments)
        )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _one_turn() -> list[Message]:
    return [_message("user", QUESTION), _message("assistant", ANSWER)]
