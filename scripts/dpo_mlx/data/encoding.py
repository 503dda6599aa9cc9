"""Turns pairs into token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from ..config import Config, Scalar
from ..files.errors import UserError
from . import prompt_date, tokens
from .chat_template import ChatTemplate
from .pairs import STOP, Pair

# Number of answers to measure. More would not change a percentile.
MEASURED_ANSWERS = 2000


@dataclass(frozen=True)
class EncodedAnswer:
    """A prompt and one answer as token ids. The losses score `ids[prompt_length:]`."""

    ids: tuple[int, ...]
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length

    def truncate(self, tokens: int) -> EncodedAnswer:
        """Returns the sequence with at most `tokens` tokens of the answer."""
        return replace(self, ids=self.ids[: self.prompt_length + tokens])


@dataclass(frozen=True)
class EncodedPair:
    """Both sequences of a pair, and the pair's line in its file."""

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

    def match_lengths(self) -> EncodedPair:
        """Returns the pair unchanged if rejected ends its turn within the length of chosen.
        Otherwise returns both answers without an end of turn, rejected cut to the length of chosen.
        """
        has_end = self.rejected.ids[-1] == self.chosen.ids[-1]
        if has_end and self.rejected.answer_length <= self.chosen.answer_length:
            return self
        length = self.chosen.answer_length - 1
        return replace(
            self, chosen=self.chosen.truncate(length), rejected=self.rejected.truncate(length)
        )


class Encoder:
    """Turns text into token ids with a model's tokenizer and chat template.

    Prompt and answer are joined as ids, so no token spans both: sampling also starts from the
    prompt's ids. The token that ends a turn becomes one of the tokenizer's stop tokens.

    `day` is the date that a template may write. Raises UserError for an unusable chat template (see
    ChatTemplate) and for text that the tokenizer cannot encode (see `tokens.encode`).
    """

    def __init__(
        self,
        tokenizer: Any,
        system_prompt: str = "",
        template_args: Mapping[str, Scalar] | None = None,
        day: date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, system_prompt, template_args or {}, day)
        self._context = self.template.before_answer()
        self._context_ids = tokens.encode(tokenizer, self._context)
        self.end_of_turn = self._end_of_turn()
        token, after = self.end_token, self.template.after_answer()
        self.template_ends_turn = token in after
        self._before_end = after.partition(token)[0] if self.template_ends_turn else ""
        self.is_new_stop = self.end_of_turn not in tokenizer.eos_token_ids
        if self.is_new_stop:
            tokenizer.add_eos_token(str(self.end_of_turn))

    @classmethod
    def of(cls, tokenizer: Any, config: Config) -> Encoder:
        """Returns an encoder with a run's system message, template arguments and date."""
        day = prompt_date.read(config.pairs)
        return cls(tokenizer, config.system_prompt, config.chat_template_args, day)

    @property
    def end_token(self) -> str:
        """The text of the token that ends a turn."""
        return str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn))

    def prompt_ids(self, question: str) -> list[int]:
        """The ids of a question's prompt, up to where the answer begins."""
        return tokens.encode(self.tokenizer, self.render(question))

    def render(self, question: str) -> str:
        """The text of a question's prompt."""
        return self.template.render(question)

    def answer_ids(self, text: str, finish: str = STOP) -> list[int]:
        """The ids of an answer, with the end of turn if the answer was not cut."""
        text = self.template.answer(text)
        if finish != STOP:
            return self._ids_after_prompt(text)
        return [*self._ids_after_prompt(text + self._before_end), self.end_of_turn]

    def encode(self, question: str, answer: str, finish: str = STOP) -> EncodedAnswer:
        prompt = self.prompt_ids(question)
        return EncodedAnswer((*prompt, *self.answer_ids(answer, finish)), len(prompt))

    def pair(self, pair: Pair) -> EncodedPair:
        return EncodedPair(
            self.encode(pair.prompt, pair.chosen),
            self.encode(pair.prompt, pair.rejected, pair.rejected_finish),
            pair.line,
        )

    def _ids_after_prompt(self, text: str) -> list[int]:
        """The ids of a text that follows a prompt.

        SentencePiece tokenizers add a blank to a text that stands alone. So the text is encoded
        after the end of a prompt, unless a token would then span both.
        """
        ids, start = tokens.encode(self.tokenizer, self._context + text), len(self._context_ids)
        if ids[:start] == self._context_ids:
            return ids[start:]
        return tokens.encode(self.tokenizer, text)

    def _end_of_turn(self) -> int:
        """The token that ends an answer: the first token after it in the chat template that is a
        stop token or an added token, such as <|im_end|>. Else the tokenizer's eos_token.
        """
        ids = tokens.encode(self.tokenizer, self.template.after_answer())
        stop_ids = self.tokenizer.eos_token_ids
        ends = {*stop_ids, *tokens.markup(self.tokenizer)}
        default = self.tokenizer.eos_token_id
        return next((i for i in ids if i in ends), min(stop_ids) if default is None else default)


def encode_all(
    pairs: list[Pair], encoder: Encoder, max_length: int
) -> tuple[list[EncodedPair], list[int]]:
    """Returns (pairs whose longer side fits `max_length` tokens, lines of the other pairs)."""
    limit = max_characters(encoder, max_length)
    encoded_pairs, dropped_lines = [], []
    for pair in pairs:
        longer = max(len(pair.chosen), len(pair.rejected))
        encoded = encoder.pair(pair) if len(pair.prompt) + longer <= limit else None
        if encoded is not None and encoded.length <= max_length:
            encoded_pairs.append(encoded)
        else:
            dropped_lines.append(pair.line)
    return encoded_pairs, dropped_lines


def require_pairs(path: Path, pairs: list[EncodedPair]) -> None:
    """Raises UserError when no pair of a file fits in `data.max_length`."""
    if not pairs:
        raise UserError(f"{path}: every pair is longer than data.max_length tokens; raise it")


def max_characters(encoder: Encoder, max_length: int) -> int:
    """The most characters that `max_length` tokens can hold: no token is longer than the longest in
    the vocabulary. Longer texts can be dropped without tokenising them. (A tokenizer that drops
    repeated blanks could fit more, but a text with that many blanks is not an answer.)
    """
    return max_length * max(map(len, encoder.tokenizer.get_vocab()))


def chosen_lengths(pairs: list[Pair], encoder: Encoder, max_length: int) -> list[int]:
    """Lengths of the first MEASURED_ANSWERS chosen answers, in tokens with the end of turn. Leaves
    out answers that cannot fit in `max_length` tokens.
    """
    limit = max_characters(encoder, max_length)
    answers = [pair.chosen for pair in pairs if len(pair.prompt) + len(pair.chosen) <= limit]
    return [len(encoder.answer_ids(answer)) for answer in answers[:MEASURED_ANSWERS]]


def sequences(pairs: list[EncodedPair]) -> Iterator[EncodedAnswer]:
    """Yield both sides of every pair, chosen first."""
    for pair in pairs:
        yield from pair.sides


def digest(pairs: list[EncodedPair]) -> str:
    """SHA-256 of all token ids and answer spans."""
    spans = [(s.ids, s.prompt_length) for s in sequences(pairs)]
    return hashlib.sha256(repr(spans).encode()).hexdigest()
