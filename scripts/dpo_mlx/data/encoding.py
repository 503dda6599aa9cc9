"""Pairs as token ids: a prompt with its answer, and which of the ids are the answer's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config, Scalar
from ..files.errors import UserError
from . import tokens
from .chat_template import ChatTemplate
from .pairs import STOP, Pair

# Answers whose lengths are counted. More would not change a percentile.
COUNTED = 2000


@dataclass(frozen=True)
class EncodedAnswer:
    """A prompt and one answer as token ids; `ids[prompt_length:]` are the scored ones."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    def first(self, tokens: int) -> EncodedAnswer:
        """With no more than so many tokens of the answer."""
        return replace(self, ids=self.ids[: self.prompt_length + tokens])


@dataclass(frozen=True)
class EncodedPair:
    """The two sequences of a pair, and its line in the pair file."""

    chosen: EncodedAnswer
    rejected: EncodedAnswer
    line: int

    @property
    def sides(self) -> tuple[EncodedAnswer, EncodedAnswer]:
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
    Raises UserError for a chat template that cannot be used, and for text that the tokenizer cannot
    turn into ids of this model; see ChatTemplate and `tokens.encode`.
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str = "",
        template_args: Mapping[str, Scalar] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, system_prompt, template_args or {})
        self.end_of_turn = self._end_of_turn()

    @classmethod
    def of(cls, tokenizer: Any, config: Config) -> Encoder:
        """An encoder with a run's system message and template arguments."""
        return cls(tokenizer, config.system_prompt, config.chat_template_args)

    def prompt(self, question: str) -> list[int]:
        """Ids of the rendered question, up to where the answer begins."""
        return tokens.encode(self.tokenizer, self.rendered(question))

    def rendered(self, question: str) -> str:
        """The prompt as the model sees it."""
        return self.template.rendered(question)

    def answer(self, text: str, finish: str = STOP) -> list[int]:
        """Ids of an answer, with the end of turn when the answer ended by itself."""
        ids = tokens.encode(self.tokenizer, text)
        return [*ids, self.end_of_turn] if finish == STOP else ids

    def sequence(self, question: str, answer: str, finish: str = STOP) -> EncodedAnswer:
        prompt = self.prompt(question)
        return EncodedAnswer((*prompt, *self.answer(answer, finish)), len(prompt))

    def pair(self, pair: Pair) -> EncodedPair:
        return EncodedPair(
            self.sequence(pair.prompt, pair.chosen),
            self.sequence(pair.prompt, pair.rejected, pair.rejected_finish),
            pair.line,
        )

    def _end_of_turn(self) -> int:
        """The stop token that the chat template writes after an answer."""
        after = tokens.encode(self.tokenizer, self.template.after_answer())
        ends = self.tokenizer.eos_token_ids
        usual = self.tokenizer.eos_token_id
        stops = (i for i in after if i in ends)
        return next(stops, min(ends) if usual is None else usual)


def encode_all(
    pairs: list[Pair], encoder: Encoder, max_length: int
) -> tuple[list[EncodedPair], list[int]]:
    """(pairs whose longer side fits `max_length` tokens, lines of those dropped)."""
    most = most_characters(encoder, max_length)
    fitting, dropped = [], []
    for pair in pairs:
        longer = max(len(pair.chosen), len(pair.rejected))
        encoded = encoder.pair(pair) if len(pair.prompt) + longer <= most else None
        if encoded is not None and encoded.length <= max_length:
            fitting.append(encoded)
        else:
            dropped.append(pair.line)
    return fitting, dropped


def require_some(path: Path, encoded: list[EncodedPair]) -> None:
    """Raises UserError when no pair of a file fits in `data.max_length`."""
    if not encoded:
        raise UserError(f"{path}: no valid pairs left; raise data.max_length")


def most_characters(encoder: Encoder, max_length: int) -> int:
    """A text of more characters than this has more than `max_length` tokens, which is known without
    tokenising it: no token stands for more characters than the longest of the vocabulary. (A
    tokenizer that drops characters, such as repeated blanks, could fit more in, but a text of so
    many of those is not an answer.)
    """
    return max_length * max(map(len, encoder.tokenizer.get_vocab()))


def chosen_lengths(pairs: list[Pair], encoder: Encoder, max_length: int) -> list[int]:
    """Of the first COUNTED chosen answers that can fit `max_length` tokens, in tokens with the end
    of turn.
    """
    most = most_characters(encoder, max_length)
    short = [pair.chosen for pair in pairs if len(pair.prompt) + len(pair.chosen) <= most]
    return [len(encoder.answer(chosen)) for chosen in short[:COUNTED]]


def sequences(pairs: list[EncodedPair]) -> Iterator[EncodedAnswer]:
    """Both sides of every pair, chosen first."""
    for pair in pairs:
        yield from pair.sides


def digest(pairs: list[EncodedPair]) -> str:
    """SHA-256 of all token ids and answer spans."""
    spans = [(s.ids, s.prompt_length) for s in sequences(pairs)]
    return hashlib.sha256(repr(spans).encode()).hexdigest()
