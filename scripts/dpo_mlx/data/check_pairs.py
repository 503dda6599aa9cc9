"""Are these pairs that a voice can be learned from? Asked right after reading, without a model."""

from __future__ import annotations

from ..config import Config
from ..files.errors import UserError
from ..files.text import shown
from .pairs import Pair
from .questions import words

# From this share of the pairs on, a fault is the file's and not a few rows'.
MANY = 0.5


def check(train: list[Pair], valid: list[Pair], config: Config) -> list[str]:
    """What to know of pairs that can be trained on, a line each.

    Raises UserError when chosen and rejected are the same text, when all train pairs share their
    prompt or an answer, and when the valid questions are those of train.
    """
    files = shown(config.data.train_pairs), shown(config.data.valid_pairs)
    notes = []
    for path, pairs in zip(files, (train, valid), strict=True):
        notes += _same_answers(path, pairs)
    for side in ("prompt", "chosen", "rejected"):
        if len(train) > 1 and len({getattr(pair, side) for pair in train}) == 1:
            raise UserError(
                f'{files[0]}: "{side}" is the same text in all {len(train)} pairs; a voice is '
                "learned from pairs that differ: make them again with 06_generate_dpo_pairs.py"
            )
    return notes + _shared_questions(files, train, valid)


def few(lines: list[int]) -> str:
    """The first of these line numbers."""
    return ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")


def _same_answers(path: str, pairs: list[Pair]) -> list[str]:
    lines = [pair.line for pair in pairs if pair.chosen.strip() == pair.rejected.strip()]
    if not lines:
        return []
    what = f"{path}: chosen and rejected are the same text in {len(lines)} of {len(pairs)} pairs"
    if len(lines) < MANY * len(pairs):
        return [f"{what} (lines {few(lines)}), which teach nothing; remove them"]
    raise UserError(
        f"{what} (lines {few(lines)}), and nothing is learned from those; make the pairs again "
        "with 06_generate_dpo_pairs.py"
    )


def _shared_questions(files: tuple[str, str], train: list[Pair], valid: list[Pair]) -> list[str]:
    """Questions that differ only in case, blanks and punctuation are the same."""
    asked = {_question(pair) for pair in train}
    lines = [pair.line for pair in valid if _question(pair) in asked]
    if not lines:
        return []
    what = f"{files[1]}: {len(lines)} of its {len(valid)} questions"
    if len(lines) < MANY * len(valid):
        return [f"{what} (lines {few(lines)}) are also in {files[0]}: they are not held out"]
    raise UserError(
        f"{what} are also in {files[0]}, so nothing would be measured on unseen questions; set "
        "data.valid_pairs to pairs of other questions"
    )


def _question(pair: Pair) -> str:
    return words(pair.prompt) or pair.prompt
