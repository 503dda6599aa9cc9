"""Checks on the rows of a run that their token ids are what the chat template writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..files.errors import UserError
from ..files.text import shown
from . import tokens
from .check_pairs import list_lines
from .encoding import Encoder
from .pairs import Pair

# Rows of each file to compare with the template. Rendering and encoding take about a millisecond.
COMPARED_ROWS = 100


def check(encoder: Encoder, system_prompt: str, rows: Mapping[Path, list[Pair]]) -> list[str]:
    """Returns notes about the template and the tokenizer. Stages 06 and 10 call this first.

    `rows` are the pairs of each file; `rejected` is empty before stage 06 has sampled it.

    Raises UserError when a text contains markup of the chat template, and when a prompt, its answer
    and the end of turn do not have the ids of the template's own rendering of both.
    """
    _require_plain_text(encoder, system_prompt, rows)
    notes = [*encoder.template.notes(), *_end_notes(encoder)]
    for path, pairs in rows.items():
        notes += _compare(encoder, path, pairs[:COMPARED_ROWS])
    return notes


def markup_by_line(encoder: Encoder, pairs: list[Pair]) -> dict[int, str]:
    """The lines whose text contains markup of the chat template, each with the first such token.

    A rejected answer may contain all but stop tokens, because models write them.
    """
    by_id = tokens.markup(encoder.tokenizer)
    markup = _any_of({*by_id.values(), *encoder.template.marks()})
    stop = _any_of(by_id[number] for number in by_id if number in encoder.tokenizer.eos_token_ids)
    matches = {
        pair.line: markup.search(pair.prompt)
        or markup.search(pair.chosen)
        or stop.search(pair.rejected)
        for pair in pairs
    }
    return {line: match[0] for line, match in matches.items() if match}


def _require_plain_text(
    encoder: Encoder, system_prompt: str, rows: Mapping[Path, list[Pair]]
) -> None:
    """Raises UserError that counts the rows with markup of the chat template in their text.

    Such rows are refused, not cleaned: some hold a whole conversation, some end with a stop token
    of their own, and some write about markup. Only their author can tell what to keep.
    """
    for mark in markup_by_line(encoder, [Pair(system_prompt, "", "")]).values():
        raise UserError(
            f"system_prompt: contains {mark}, which is markup of the chat template; remove it"
        )
    for path, pairs in rows.items():
        if marks := markup_by_line(encoder, pairs):
            lines = [*marks]
            raise UserError(
                f"{shown(path)}: {len(lines)} of {len(pairs)} rows contain markup of the model's "
                f"chat template, such as {marks[lines[0]]} (lines {list_lines(lines)}), and the "
                "model would read it as the start or the end of a turn; remove it, because the "
                "template adds its own"
            )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the first of these texts. Without texts, it finds nothing."""
    return re.compile("|".join(map(re.escape, filter(None, texts))) or "(?!)")


def _end_notes(encoder: Encoder) -> Iterator[str]:
    token = encoder.end_token
    if encoder.is_new_stop:
        yield (
            f"the chat template ends a turn with {token}, which is not among the model's "
            "eos_token_id. It is trained as the end of an answer, and answers here and those of "
            "the fused model stop at it; to use the adapters without fusing, add "
            f"--extra-eos-token '{token}'"
        )
    if not encoder.template_ends_turn:
        yield (
            f"the chat template writes no special token after an answer, so {token}, the "
            "tokenizer's eos_token, is trained as its end"
        )


def _compare(encoder: Encoder, path: Path, pairs: list[Pair]) -> Iterator[str]:
    """Compare the ids of rows with those of the template's text in one piece.

    Raises UserError when the text differs. Yields a note when only the tokens differ.
    """
    joined = [pair.line for pair in pairs if _joins(encoder, path, pair)]
    if joined:
        yield (
            f"{shown(path)}: in {len(joined)} of {len(pairs)} rows (lines {list_lines(joined)}) "
            "the tokenizer would join the end of the prompt and the start of the answer in one "
            "token; they are kept apart, because a sampled answer also starts after the prompt"
        )


def _joins(encoder: Encoder, path: Path, pair: Pair) -> bool:
    """Whether the tokenizer joins the prompt and the answer of a pair.

    Raises UserError when their text is not the template's.
    """
    template = encoder.template
    try:
        template.require_same_turns(pair.prompt, pair.chosen)
    except UserError as error:
        raise UserError(f"{shown(path)}:{pair.line}: {error}") from error
    ids = list(encoder.encode(pair.prompt, pair.chosen).ids)
    if not encoder.template_ends_turn:
        del ids[-1]
    turns = template.render(pair.prompt) + template.answer(pair.chosen) + template.after_answer()
    turns_ids = tokens.encode(encoder.tokenizer, turns)
    if turns_ids[: len(ids)] == ids:
        return False
    decode = encoder.tokenizer.decode
    if not decode(turns_ids).startswith(decode(ids)):
        raise UserError(
            f"{shown(path)}:{pair.line}: the model's tokenizer gives other text when this question "
            "and its answer are encoded in two parts; use another model"
        )
    return True
