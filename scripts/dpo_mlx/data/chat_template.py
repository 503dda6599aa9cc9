"""How a model's chat template renders a question: its system message, its arguments, its thinking.

We render sample messages to see what a template does, and never read the template's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from ..config import Scalar
from ..files.errors import UserError
from ..files.text import reason
from ..process.time_limit import cpu_limit

# Sample messages to render. No template contains these words.
QUESTION, ANSWER, SYSTEM = "The question?", "The answer.", "The system message."
# A question that a template might cut short.
LONG_QUESTION = f"{QUESTION} {'And why? ' * 500}That is all."
# Seconds that one call may compute. A template takes a thousandth, and a tenth when it is compiled.
RENDERING = 2.0
# Characters that a template may add to the messages.
MARKUP_LIMIT = 1_000_000
# One question is rendered so many times to see whether chance is involved.
RENDERINGS = 16
# Marks of a thinking block, for a tokenizer that names none.
THINKING = ("<think>", "</think>")
OTHER = "correct chat_template in the model's folder, or use another model"
WITHOUT_THINKING: dict[str, Scalar] = {"enable_thinking": False}

Message = dict[str, str]
Arguments = Mapping[str, Scalar]


class NotRendered(UserError):
    """A template fails on some messages or arguments; `cause` is what it says."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"model: its chat template fails ({cause}); {OTHER}")
        self.cause = cause


class ChatTemplate:
    """A model's chat template with the system message and the arguments of a run.

    Raises UserError when the tokenizer has no chat template, when the template rejects the system
    message or the arguments, when prompts lack the question or differ by chance, and when it leaves
    a thinking block open before the answer.
    """

    def __init__(self, tokenizer: Any, system_prompt: str, arguments: Arguments) -> None:
        _require_template(tokenizer)
        self._tokenizer = tokenizer
        self._system = [_message("system", system_prompt)] if system_prompt else []
        self._arguments = dict(arguments)
        self._require_rendering()
        self._require_messages()
        self._refuse_chance()
        self._refuse_open_thinking()

    def rendered(self, question: str) -> str:
        """The prompt, up to where the answer begins."""
        return self._prompt(self._system, self._arguments, question)

    def after_answer(self) -> str:
        """The text after an answer: the end of turn, and whatever the template adds."""
        return self._render(_one_turn(), self._arguments).rpartition(ANSWER)[2]

    def system_message(self) -> str | None:
        """The system message in every prompt: the run's, or the template's default. None if there
        is none.
        """
        try:
            marked = self._prompt([_message("system", SYSTEM)], self._arguments)
        except NotRendered:
            return None
        before, marker, after = marked.partition(SYSTEM)
        prompt = self.rendered(QUESTION)
        message = prompt[len(before) : len(prompt) - len(after)]
        if not marker or before + message + after != prompt:
            return None
        return message or None

    def notes(self) -> Iterator[str]:
        """Warnings about this template and its arguments, to print."""
        if without_effect := [name for name in self._arguments if self._has_no_effect(name)]:
            names = ", ".join(without_effect)
            yield f"chat_template_args: these do not change this model's prompts: {names}"
        if self._may_think():
            yield (
                "this model may think before it answers, and its thoughts would end up in the "
                "rejected answers; set chat_template_args: {enable_thinking: false}"
            )

    def _render(self, messages: list[Message], arguments: Arguments, **call: Any) -> str:
        """Raises NotRendered when the template fails, takes too long or writes too much."""
        try:
            with cpu_limit(RENDERING):
                text = self._tokenizer.apply_chat_template(
                    messages, tokenize=False, **arguments, **call
                )
                text.encode()  # half a surrogate pair is an error here, and not in the tokenizer
        except Exception as error:  # a template can divide by zero, recurse and whatever else
            raise NotRendered(reason(error)) from error
        added = len(text) - sum(len(message["content"]) for message in messages)
        if added > MARKUP_LIMIT:
            raise NotRendered(f"it adds {added} characters to a message")
        return text

    def _prompt(self, system: list[Message], arguments: Arguments, question: str = QUESTION) -> str:
        messages = [*system, _message("user", question)]
        return self._render(messages, arguments, add_generation_prompt=True)

    def _renders(self, system: list[Message], arguments: Arguments) -> bool:
        try:
            self._prompt(system, arguments)
        except NotRendered:
            return False
        return True

    def _require_rendering(self) -> None:
        """Raises UserError, naming the key at fault, when the template cannot render a prompt."""
        try:
            self.rendered(QUESTION)
        except NotRendered as error:
            raise UserError(self._fault(error.cause)) from error

    def _require_messages(self) -> None:
        """Raises UserError when the template leaves out a question or an answer, or a part."""
        if LONG_QUESTION not in self.rendered(LONG_QUESTION):
            raise UserError(f"model: its chat template drops or shortens the question; {OTHER}")
        if ANSWER not in self._render(_one_turn(), self._arguments):
            raise UserError(f"model: its chat template drops the answer; {OTHER}")

    def _refuse_chance(self) -> None:
        """Raises UserError when the same question becomes another prompt again and again. The date,
        which some templates write, changes once at most.
        """
        prompts = [self.rendered(QUESTION) for _ in range(RENDERINGS)]
        if sum(one != next_one for one, next_one in pairwise(prompts)) > 1:
            raise UserError(
                "model: its chat template renders the same question differently each time, so a "
                f"run could not be repeated; {OTHER}"
            )

    def _fault(self, cause: str) -> str:
        if self._system and self._renders([], self._arguments):
            return f'system_prompt: the model\'s chat template refuses it ({cause}); set it to ""'
        if self._arguments and self._renders(self._system, {}):
            return (
                f"chat_template_args: the model's chat template fails with them ({cause}); "
                "correct or remove them"
            )
        return str(NotRendered(cause))

    def _refuse_open_thinking(self) -> None:
        """Raises UserError when a prompt ends inside a thinking block: the answers would be trained
        as the model's thoughts.
        """
        if not self._opens_thinking(self._arguments):
            return
        thinking_off = {**self._arguments, **WITHOUT_THINKING}
        if self._renders(self._system, thinking_off) and not self._opens_thinking(thinking_off):
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
        """Whether the template closes the thinking block only when enable_thinking is false."""
        _, end = self._thinking_marks()
        thinking_off = {**self._arguments, **WITHOUT_THINKING}
        return (
            end not in self._generation_prompt(self._arguments)
            and self._renders(self._system, thinking_off)
            and end in self._generation_prompt(thinking_off)
        )

    def _generation_prompt(self, arguments: Arguments) -> str:
        """The text between a question and its answer."""
        return self._prompt(self._system, arguments).rpartition(QUESTION)[2]

    def _thinking_marks(self) -> tuple[str, str]:
        start, end = self._tokenizer.think_start, self._tokenizer.think_end
        return (start, end) if start and end else THINKING

    def _has_no_effect(self, name: str) -> bool:
        """Whether the prompt and the end of turn stay the same without this argument."""
        others = {key: value for key, value in self._arguments.items() if key != name}
        return (
            self._renders(self._system, others)
            and self._prompt(self._system, others) == self.rendered(QUESTION)
            and self._render(_one_turn(), others) == self._render(_one_turn(), self._arguments)
        )


def _require_template(tokenizer: Any) -> None:
    if not tokenizer.has_chat_template:
        raise UserError("model: its tokenizer has no chat template; use an instruct model")
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise UserError(
            f"model: none of its chat templates ({', '.join(named)[:100] or 'an empty list'}) is "
            "named default; name one so in the model's tokenizer_config.json, or use another model"
        )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _one_turn() -> list[Message]:
    return [_message("user", QUESTION), _message("assistant", ANSWER)]
