"""Checks that a model can learn a voice from these pairs. Needs no model."""

from __future__ import annotations

from ..config import Config
from ..files.errors import UserError
from ..files.text import shown
from .pairs import Pair
from .questions import words

# When at least this share of the pairs has a fault, the whole file is wrong.
WHOLE_FILE = 0.5


def check(train: list[Pair], valid: list[Pair], config: Config) -> list[str]:
    """Returns warnings about pairs that can still be trained on.

    Raises UserError when chosen and rejected are the same in half of the pairs or more, when all
    train pairs have the same prompt or answer, and when half of the valid questions or more are
    also train questions.
    """
    files = shown(config.data.train_pairs), shown(config.data.valid_pairs)
    notes = []
    for path, pairs in zip(files, (train, valid), strict=True):
        notes += _same_answers(path, pairs)
    for side in ("prompt", "chosen", "rejected"):
        if len(train) > 1 and len({getattr(pair, side) for pair in train}) == 1:
            raise UserError(
                f'{files[0]}: "{side}" is the same text in all {len(train)} pairs, and nothing can '
                "be learned from that; make the pairs again with 06_generate_dpo_pairs.py"
            )
    return notes + _shared_questions(files, train, valid)


def list_lines(lines: list[int]) -> str:
    """The first ten line numbers, and "..." if there are more."""
    return ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")


def _same_answers(path: str, pairs: list[Pair]) -> list[str]:
    lines = [pair.line for pair in pairs if pair.chosen.strip() == pair.rejected.strip()]
    if not lines:
        return []
    fault = (
        f"{path}: chosen and rejected are the same text in {len(lines)} of {len(pairs)} pairs "
        f"(lines {list_lines(lines)})"
    )
    if len(lines) < WHOLE_FILE * len(pairs):
        return [f"{fault}; the model learns nothing from these; remove them"]
    raise UserError(
        f"{fault}; the model learns nothing from these; make the pairs again with "
        "06_generate_dpo_pairs.py"
    )


def _shared_questions(files: tuple[str, str], train: list[Pair], valid: list[Pair]) -> list[str]:
    """Questions that differ only in case, blanks and punctuation count as the same."""
    train_questions = {_normalise(pair) for pair in train}
    lines = [pair.line for pair in valid if _normalise(pair) in train_questions]
    if not lines:
        return []
    count = f"{files[1]}: {len(lines)} of its {len(valid)} questions"
    if len(lines) < WHOLE_FILE * len(valid):
        return [
            f"{count} (lines {list_lines(lines)}) are also in {files[0]}, so they are not held "
            "out; remove them"
        ]
    raise UserError(
        f"{count} are also in {files[0]}, so they are not held out; set "
        "data.valid_pairs to pairs with other questions"
    )


def _normalise(pair: Pair) -> str:
    return words(pair.prompt) or pair.prompt
